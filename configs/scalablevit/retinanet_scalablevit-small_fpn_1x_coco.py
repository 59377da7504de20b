# The authors did not release detection: the recipe is customary for the models that their tables name.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_1x_adamw.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='ScalableViT',
        arch='small',
        out_indices=(1, 2, 3),  # the first map would have a norm, and nobody to read it
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/scalablevit_small.pth'),
    ),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
