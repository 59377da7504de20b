_base_ = './dinov2-small_linear_8xb2-40k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='giant',
        ffn_type='swiglu',
        frozen_stages=40,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth'),
    ),
    decode_head=dict(in_channels=[1536], channels=1536),
)
