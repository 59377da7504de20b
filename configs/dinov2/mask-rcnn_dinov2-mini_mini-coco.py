# DINOv2 with registers in small: trains from scratch on the demonstration data.
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
        type='PlainViT',
        arch=dict(embed_dims=128, num_layers=6, num_heads=4, mlp_ratio=4),
        img_size=160,
        patch_size=8,
        norm_outputs=True,
        num_register_tokens=4,
        interpolate_antialias=True,
        layer_scale_init_value=0.1,  # not 1e-5, since it learns from scratch
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=128, out_channels=96, scale_factors=(2, 1, 0.5)),
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
