# ConvNeXt V2 of timm in small: trains from scratch on the demonstration data in minutes on two CPU cores.
_base_ = [
    '../_base_/models/mini_mask-rcnn_fpn.py',
    '../_base_/datasets/mini_coco_instance.py',
    '../_base_/schedules/mini_7e.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='TimmBackbone',
        model_name='convnextv2_atto',
        depths=(2, 2, 4, 2),
        dims=(40, 80, 160, 320),
    ),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
