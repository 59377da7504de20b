# Customary: our recipe for Mask R-CNN with DINOv2, with ViTDet's layer decay of a model with 24 blocks.
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
        type='TimmBackbone',
        model_name='sam2_hiera_base_plus.fb_r896_2pt1',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/timm/sam2_hiera_base_plus.fb_r896_2pt1/resolve/main/model.safetensors',
        ),
    ),
    neck=dict(in_channels=[112, 224, 448, 896]),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    _base_.multi_scale_crop,
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
