# Tree crowns: DINOv2-S is fine-tuned, with smaller steps for earlier blocks. docs/tutorials/tree_crowns.md explains it.
_base_ = ['../_base_/datasets/tree_crowns.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.engine.layer_decay'])

strides = [7, 14, 28]
model = dict(
    type='ATSS',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=28,
    ),
    backbone=dict(
        type='PlainViT',
        arch='small',
        img_size=518,
        patch_size=14,
        layer_scale_init_value=1e-5,
        interpolate_offset=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/dinov2_small.safetensors'),
    ),
    neck=dict(type='SimpleFeaturePyramid', in_channels=384, out_channels=128, scale_factors=(2, 1, 0.5), num_outs=3),
    bbox_head=dict(
        type='ATSSHead',
        num_classes=1,
        in_channels=128,
        stacked_convs=2,
        feat_channels=128,
        anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=strides
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    ),
    # Crowns that belong to a neighboring tile are neither crowns nor background.
    train_cfg=dict(
        assigner=dict(type='ATSSAssigner', topk=9, ignore_iof_thr=0.5), allowed_border=-1, pos_weight=-1, debug=False
    ),
    # Crowns seen from above hardly overlap: of boxes that overlap by more than 0.4 one is kept.
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.4), max_per_img=100
    ),
)

max_iters = 90
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=30)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    constructor='BackboneLayerDecay',
    paramwise_cfg=dict(layer_decay_rate=0.5),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', T_max=max_iters, by_epoch=False),
]
default_hooks = dict(
    logger=dict(interval=5, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=max_iters, save_optimizer=False),
)
log_processor = dict(by_epoch=False, window_size=5)
randomness = dict(seed=0)
