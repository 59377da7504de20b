# ImageNet-21k weights have a class token, which the authors' detectors start without; see the README.
_base_ = ['./cascade-mask-rcnn_mvitv2-base_fpn_ms-3x_coco.py', '../_base_/datasets/large_scale_jitter.py']

model = dict(
    data_preprocessor=dict(batch_augments=_base_.pad_to_image_size),
    backbone=dict(
        arch='huge',
        drop_path_rate=0.6,
        with_cp=True,
        init_cfg=dict(checkpoint='checkpoints/MViTv2_H_in21k_without-token.pth'),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    *_base_.large_scale_jitter,
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
