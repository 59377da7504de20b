_base_ = './cascade-mask-rcnn_plainvit-base-mae_lsj-100e_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        global_attn_indexes=(5, 11, 17, 23),
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='checkpoints/mae_pretrain_vit_large.pth'),
    ),
    neck=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
