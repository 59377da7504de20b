# Semantic FPN that trains from scratch on the demonstration data in minutes on two CPU cores.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    '../_base_/datasets/mini_coco_semantic.py',
    '../_base_/schedules/mini_2800i.py',
    'mmseg::_base_/default_runtime.py',
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
        # PyTorch's initialization: without pretraining, its smaller convolution weights learn faster than the authors'.
        init_cfg=dict(
            type='Kaiming',
            layer=['Conv2d', 'Linear'],
            a=2.23606797749979,
            distribution='uniform',
            mode='fan_in',
            nonlinearity='leaky_relu',
        ),
    ),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=96),
    decode_head=dict(
        in_channels=[96, 96, 96, 96],
        channels=64,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        dropout_ratio=0,
        # Nine of ten pixels are background.
        loss_decode=dict(class_weight=[0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ),
)

train_cfg = dict(max_iters=4400, val_interval=2200)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=4400, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=4400))
