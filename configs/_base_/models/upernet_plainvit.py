# UPerNet on four maps of a plain backbone, with a multi-level neck that gives them strides 4 to 32.
_base_ = 'mmseg::_base_/models/upernet_vit-b16_ln_mln.py'

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='PlainViT',
        arch='base',
        img_size=512,
        out_indices=(2, 5, 8, 11),
        final_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/jx_vit_base_p16_224-80ecf9dd.pth'),
    ),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
