_base_ = './mask-rcnn_dinov3-small_ms-3x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.0,
        frozen_stages=24,
        init_cfg=dict(checkpoint='checkpoints/dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth'),
    ),
    neck=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=1.0))
