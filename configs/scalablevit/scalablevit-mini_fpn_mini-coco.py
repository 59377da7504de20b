# Semantic FPN that trains from scratch in minutes on two CPU cores.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    '../_base_/datasets/mini_coco_semantic.py',
    '../_base_/mini_seg_runtime.py',
    '../_base_/mini_init.py',
]
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(160, 160), test_cfg=dict(size_divisor=8)),
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
        init_cfg=_base_.mini_init_cfg,
    ),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=96),
    decode_head=dict(
        in_channels=[96] * 4,
        channels=64,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        dropout_ratio=0,
        # Nine of ten pixels are background.
        loss_decode=dict(class_weight=[0.1] + [1.0] * 10),
    ),
)

max_iters = 4400
train_cfg = dict(max_iters=max_iters, val_interval=2200)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=max_iters, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
