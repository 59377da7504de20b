# A classifier of the digits in the demonstration data, from which small detectors and segmentors start.
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['mmvitzoo'])

data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True, num_classes=10)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='PlainViT',
        arch=dict(embed_dims=128, num_layers=6, num_heads=4, mlp_ratio=4),
        img_size=(56, 48),
        patch_size=8,
        with_cls_token=False,
        use_rel_pos=True,
        # Without pretraining, larger initial tables than those of the published models learn faster.
        rel_pos_std=0.5,
        # PyTorch's initialization: its smaller convolution weights learn faster than the authors', too.
        init_cfg=dict(
            type='Kaiming',
            layer=['Conv2d', 'Linear'],
            a=2.23606797749979,
            distribution='uniform',
            mode='fan_in',
            nonlinearity='leaky_relu',
        ),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=128, loss=dict(type='CrossEntropyLoss')),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=(48, 56), crop_ratio_range=(0.6, 1.0), aspect_ratio_range=(0.5, 0.9)),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(48, 56)),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='data/mini/classes', data_prefix='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root='data/mini/classes', data_prefix='val', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=45, val_interval=15)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=5))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=45, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=45), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
