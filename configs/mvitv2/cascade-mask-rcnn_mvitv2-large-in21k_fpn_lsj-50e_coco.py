# ImageNet-21k weights have a class token, which the authors' detectors start without; see the README.
_base_ = ['./cascade-mask-rcnn_mvitv2-base_fpn_ms-3x_coco.py', '../_base_/datasets/large_scale_jitter.py']

model = dict(
    data_preprocessor=dict(batch_augments=_base_.pad_to_image_size),
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='checkpoints/MViTv2_L_in21k_without-token.pth'),
    ),
    neck=dict(in_channels=[144, 288, 576, 1152]),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    *_base_.large_scale_jitter,
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

max_iters = 92187
train_cfg = dict(max_iters=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=max_iters, milestones=[81944, 88773], gamma=0.1),
]
