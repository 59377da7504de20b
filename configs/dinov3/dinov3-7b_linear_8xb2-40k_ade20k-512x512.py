_base_ = './dinov3-small_linear_8xb2-40k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='7b',
        ffn_type='swiglu',
        frozen_stages=40,
        init_cfg=dict(checkpoint='checkpoints/dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth'),
    ),
    decode_head=dict(in_channels=[4096], channels=4096),
)
