# UPerNet on a small plain backbone: trains from scratch in minutes on two CPU cores.
_base_ = [
    '../_base_/models/upernet_plainvit.py',
    '../_base_/datasets/mini_coco_semantic.py',
    '../_base_/mini_seg_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

channels = 96
norm_cfg = dict(type='BN')
# Nine of ten pixels are background.
class_weight = [0.1] + [1.0] * 10
model = dict(
    data_preprocessor=dict(size=(160, 160), test_cfg=dict(size_divisor=8)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=128, num_layers=6, num_heads=4, mlp_ratio=4),
        img_size=160,
        patch_size=8,
        out_indices=(0, 1, 3, 5),
        with_cls_token=False,
        window_size=5,
        global_attn_indexes=(1, 3, 5),
        use_rel_pos=True,
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    neck=dict(in_channels=[128] * 4, out_channels=channels, scales=[2, 1, 1, 0.5]),
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        num_classes=11,
        norm_cfg=norm_cfg,
        dropout_ratio=0,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=channels,
        channels=channels,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)
