# Trains from scratch on the demonstration data in minutes on two CPU cores.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/mini_coco_instance.py',
    '../_base_/schedules/mini_7e.py',
    'mmdet::_base_/default_runtime.py',
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

train_cfg = dict(max_epochs=14, val_interval=7)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=14, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
