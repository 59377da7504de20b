# UPerNet on ConvNeXt V2 of timm in small: trains from scratch on the demonstration data in minutes on two CPU cores.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    '../_base_/datasets/mini_coco_semantic.py',
    '../_base_/schedules/mini_2800i.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

norm_cfg = dict(type='BN')
# Nine of ten pixels are background.
class_weight = [0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
model = dict(
    data_preprocessor=dict(size=(160, 160), test_cfg=dict(size_divisor=32)),
    backbone=dict(
        _delete_=True,
        type='TimmBackbone',
        model_name='convnextv2_atto',
        depths=(2, 2, 4, 2),
        dims=(40, 80, 160, 320),
    ),
    decode_head=dict(
        in_channels=[40, 80, 160, 320],
        channels=96,
        num_classes=11,
        norm_cfg=norm_cfg,
        dropout_ratio=0,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=160,
        channels=96,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)
