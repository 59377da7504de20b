# Customary: our recipe for Mask R-CNN with DINOv2, with ViTDet's drop path of ViT-B. Patches of 14 x 14 pixels are
# resampled to 16 x 16, for strides 4 to 32. At 256 pixels they have the table's 16 x 16 positions.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/datasets/multi_scale.py',
    '../_base_/schedules/dinov2_3x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.engine.layer_decay'])

model = dict(
    data_preprocessor=dict(mean=[122.7709, 116.746, 104.0937], std=[68.5005, 66.6322, 70.3232]),
    backbone=dict(
        _delete_=True,
        type='TimmBackbone',
        model_name='eva02_base_patch14_224.mim_in22k',
        patch_size=16,
        img_size=256,
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/timm/eva02_base_patch14_224.mim_in22k/resolve/main/model.safetensors',
        ),
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=768),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    _base_.multi_scale_crop,
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
