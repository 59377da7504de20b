# The authors' recipe, as released in Detectron2. Their ImageNet checkpoint is loaded as it is; see the README.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/datasets/multi_scale.py',
    '../_base_/schedules/mvitv2_3x.py',
    '../_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='MViTv2',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        window_attention=True,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_T_in1k.pyth'
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    _base_.multi_scale_crop,
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
# 64 images per iteration on 8 GPUs.
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(pipeline=train_pipeline),
)
