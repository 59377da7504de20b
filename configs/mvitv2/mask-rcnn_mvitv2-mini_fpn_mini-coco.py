# Trains from scratch on the demonstration data in minutes on two CPU cores.
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
        type='MViTv2',
        arch=dict(embed_dims=48, num_layers=7, num_heads=1, downscale_indices=(1, 3, 6)),
        out_indices=(0, 1, 2, 3),
        window_attention=True,
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
