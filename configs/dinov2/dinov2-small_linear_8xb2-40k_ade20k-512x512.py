# The authors' recipe: a linear layer on the frozen features of the last block.
_base_ = [
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/dinov2_linear_40k.py',
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
        size=(512, 512),
    ),
    backbone=dict(
        type='PlainViT',
        arch='small',
        img_size=518,
        patch_size=14,
        norm_outputs=True,
        interpolate_offset=0.1,
        layer_scale_init_value=1e-5,
        frozen_stages=12,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth',
        ),
    ),
    decode_head=dict(
        type='BNHead',
        in_channels=[384],
        in_index=[0],
        input_transform='resize_concat',
        channels=384,
        num_classes=150,
    ),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
