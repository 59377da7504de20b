# The head of DINOv2's linear segmentors on a small backbone that learns from scratch.
_base_ = [
    '../_base_/datasets/mini_coco_semantic.py',
    '../_base_/schedules/mini_2800i.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.decode_heads'])

model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(160, 160),
    ),
    backbone=dict(
        type='PlainViT',
        arch=dict(embed_dims=128, num_layers=6, num_heads=4, mlp_ratio=4),
        img_size=160,
        patch_size=8,
        out_indices=(2, 3, 4, 5),
        norm_outputs=True,
        num_register_tokens=4,
        interpolate_antialias=True,
        layer_scale_init_value=0.1,  # not 1e-5, since it learns from scratch
    ),
    decode_head=dict(
        type='BNHead',
        in_channels=[128, 128, 128, 128],
        in_index=[0, 1, 2, 3],
        input_transform='resize_concat',
        channels=512,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        # Nine of ten pixels are background.
        loss_decode=dict(type='CrossEntropyLoss', class_weight=[0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ),
    test_cfg=dict(mode='whole'),
)
