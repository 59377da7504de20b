# UPerNet on DINOv3's backbone in small: trains from scratch on the demonstration data.
_base_ = [
    'mmseg::_base_/models/upernet_vit-b16_ln_mln.py',
    '../_base_/datasets/mini_coco_semantic.py',
    '../_base_/schedules/mini_2800i.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

norm_cfg = dict(type='BN')
# Nine of ten pixels are background.
class_weight = [0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(160, 160), test_cfg=dict(size_divisor=8)),
    backbone=dict(
        _delete_=True,
        type='PlainViT',
        arch=dict(embed_dims=128, num_layers=6, num_heads=4, mlp_ratio=4),
        patch_size=8,
        norm_outputs=True,
        num_register_tokens=4,
        pos_type='rope',
        layer_scale_init_value=0.1,  # not 1e-5, since it learns from scratch
        norm_eps=1e-5,
    ),
    neck=dict(
        _delete_=True,
        type='SimpleFeaturePyramid',
        in_channels=128,
        out_channels=96,
        scale_factors=(2, 1, 0.5),
        num_outs=4,
    ),
    decode_head=dict(
        in_channels=[96, 96, 96, 96],
        channels=96,
        num_classes=11,
        norm_cfg=norm_cfg,
        dropout_ratio=0,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=96,
        in_index=1,
        channels=96,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)
