# The ViTAE authors' recipe.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/datasets/large_scale_jitter.py',
    '../_base_/schedules/vitae_25e.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads', 'mmvitzoo.engine.layer_decay'])

norm_cfg = dict(type='LayerNorm2d', eps=1e-5)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type='ViTAE',
        arch='base',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/vitae_base_mae.pth'),
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=768, halve_channels=False, norm_cfg=norm_cfg),
    rpn_head=dict(type='NormRPNHead', num_convs=2, norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
train_pipeline = _base_.lsj_train_pipeline
test_pipeline = _base_.lsj_test_pipeline
# 64 images per iteration on 8 GPUs.
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    batch_sampler=None,
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',
        times=4,
        dataset=dict(
            type='CocoDataset',
            data_root='data/coco/',
            ann_file='annotations/instances_train2017.json',
            data_prefix=dict(img='train2017/'),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=train_pipeline,
        ),
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(by_epoch=True, max_keep_ckpts=3))
