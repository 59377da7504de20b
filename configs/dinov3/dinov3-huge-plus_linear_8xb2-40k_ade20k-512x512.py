_base_ = './dinov3-small_linear_8xb2-40k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='huge_plus',
        ffn_type='swiglu',
        frozen_stages=32,
        init_cfg=dict(checkpoint='checkpoints/dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth'),
    ),
    decode_head=dict(in_channels=[1280], channels=1280),
)
