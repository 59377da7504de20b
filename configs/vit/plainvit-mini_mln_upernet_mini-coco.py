# UPerNet on a small plain backbone: trains from scratch in minutes on two CPU cores.
_base_ = [
    '../_base_/models/upernet_plainvit.py',
    '../_base_/datasets/mini_coco_semantic.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

channels = 96
norm_cfg = dict(type='BN')
# Nine of ten pixels are background.
class_weight = [0.1] + [1.0] * 10
model = dict(
    data_preprocessor=dict(size=(160, 160), test_cfg=dict(size_divisor=8)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=128, num_layers=6, num_heads=4, mlp_ratio=4),
        img_size=160,
        patch_size=8,
        out_indices=(0, 1, 3, 5),
        with_cls_token=False,
        window_size=5,
        global_attn_indexes=(1, 3, 5),
        use_rel_pos=True,
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    neck=dict(in_channels=[128] * 4, out_channels=channels, scales=[2, 1, 1, 0.5]),
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        num_classes=11,
        norm_cfg=norm_cfg,
        dropout_ratio=0,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=channels,
        channels=channels,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)

max_iters = 2800
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=1400)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=max_iters, by_epoch=False),
]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=max_iters),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
