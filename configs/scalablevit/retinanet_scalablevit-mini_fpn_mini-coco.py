# Trains from scratch in minutes on two CPU cores.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/mini_coco_instance.py',
    '../_base_/mini_det_runtime.py',
    '../_base_/mini_init.py',
]
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='ScalableViT',
        arch=dict(
            embed_dims=(32, 64, 128, 192),
            num_layers=(2, 2, 4, 2),
            num_heads=(1, 2, 4, 6),
            spatial_ratios=(8, 4, 2, 1),
            channel_ratios=(1, 1, 1, 1),
        ),
        out_indices=(1, 2, 3),
        init_cfg=_base_.mini_init_cfg,
    ),
    neck=dict(in_channels=[64, 128, 192], out_channels=96, start_level=0, num_outs=3),
    bbox_head=dict(
        num_classes=10,
        in_channels=96,
        feat_channels=96,
        stacked_convs=2,
        anchor_generator=dict(strides=[8, 16, 32]),
    ),
    test_cfg=dict(max_per_img=20),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator

max_epochs = 14
train_cfg = dict(max_epochs=max_epochs, val_interval=7)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
