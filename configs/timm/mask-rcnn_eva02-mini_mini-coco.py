# EVA-02 of timm in small: trains from scratch on the demonstration data in minutes on two CPU cores.
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
        model_name='eva02_tiny_patch14_224',
        img_size=160,
        patch_size=8,
        embed_dim=128,
        depth=6,
        num_heads=4,
        ref_feat_shape=(20, 20),
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=128, out_channels=96, scale_factors=(2, 1, 0.5)),
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
