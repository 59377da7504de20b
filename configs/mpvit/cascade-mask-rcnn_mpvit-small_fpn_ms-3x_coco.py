# The authors' recipe. Their ImageNet checkpoint is loaded as it is; see the README.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/models/cascade_heads.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/datasets/multi_scale.py',
    '../_base_/schedules/coco_270k_adamw.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads'])

model = dict(
    type='CascadeRCNN',
    backbone=dict(
        _delete_=True,
        type='MPViT',
        arch='small',
        drop_path_rate=0.2,
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(type='Pretrained', checkpoint='https://dl.dropbox.com/s/y3dnmmy8h4npz7a/mpvit_small.pth'),
    ),
    neck=dict(in_channels=[128, 216, 288, 288]),
    roi_head=dict(
        type='Detectron2CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=_base_.cascade_stage_loss_weights,
        bbox_head=[dict(head, type='Shared2FCBBoxHead') for head in _base_.cascade_bbox_heads],
    ),
    train_cfg=dict(rcnn=_base_.cascade_train_cfg),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    _base_.multi_scale_crop,
    dict(type='PackDetInputs'),
]
train_dataloader = dict(sampler=dict(type='InfiniteSampler'), dataset=dict(pipeline=train_pipeline))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000, max_keep_ckpts=3))
log_processor = dict(by_epoch=False)
