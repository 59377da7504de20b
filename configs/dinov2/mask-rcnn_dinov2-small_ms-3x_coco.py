# The recipe of czczup/ViT-Adapter for DINOv2, without its adapter. Patches of 14 x 14 pixels are resampled to 16 x 16,
# for strides 4 to 32. At 592 pixels they have the table's 37 x 37 positions.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/datasets/multi_scale.py',
    '../_base_/schedules/dinov2_3x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.engine.layer_decay'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='PlainViT',
        arch='small',
        img_size=592,
        patch_size=16,
        norm_outputs=True,
        interpolate_offset=0.1,
        layer_scale_init_value=1e-5,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth',
        ),
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=384),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    _base_.multi_scale_crop,
    dict(type='RandomCrop', crop_type='absolute_range', crop_size=(1024, 1024), allow_negative_crop=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
