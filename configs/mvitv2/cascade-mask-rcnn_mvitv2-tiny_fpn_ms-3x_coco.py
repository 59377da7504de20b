# The authors' recipe, as released in Detectron2, except for one norm: their BatchNorm weighs every image of a batch
# alike, whatever its number of regions, and SyncBN weighs every region alike.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/models/cascade_heads.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/datasets/multi_scale.py',
    '../_base_/schedules/mvitv2_3x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads'])

norm_cfg = dict(type='SyncBN')
model = dict(
    type='CascadeRCNN',
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
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        type='Detectron2CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=_base_.cascade_stage_loss_weights,
        bbox_head=[dict(head, norm_cfg=norm_cfg) for head in _base_.cascade_bbox_heads],
        mask_head=dict(norm_cfg=norm_cfg),
    ),
    train_cfg=dict(rcnn=_base_.cascade_train_cfg),
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
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000, max_keep_ckpts=3))
log_processor = dict(by_epoch=False)
