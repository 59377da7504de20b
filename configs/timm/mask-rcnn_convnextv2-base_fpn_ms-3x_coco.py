# Customary: our recipe for Mask R-CNN with DINOv2, with MMDetection's layer decay of ConvNeXt: 0.7 for each of its 12
# groups of blocks, which is 0.88 for each of the 36 blocks.
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
        model_name='convnextv2_base.fcmae_ft_in22k_in1k',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/convnextv2/im22k/convnextv2_base_22k_224_ema.pt',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    _base_.multi_scale_crop,
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.88))
