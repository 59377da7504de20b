# UPerNet on a small plain backbone: trains from scratch on the demonstration data in minutes on two CPU cores.
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
        img_size=160,
        patch_size=8,
        out_indices=(0, 1, 3, 5),
        final_norm=False,
        with_cls_token=False,
        window_size=5,
        global_attn_indexes=(1, 3, 5),
        use_rel_pos=True,
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    neck=dict(in_channels=[128, 128, 128, 128], out_channels=96, scales=[2, 1, 1, 0.5]),
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
        channels=96,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)
