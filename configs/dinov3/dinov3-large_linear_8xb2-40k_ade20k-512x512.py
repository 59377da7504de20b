_base_ = './dinov3-small_linear_8xb2-40k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='large',
        frozen_stages=24,
        init_cfg=dict(checkpoint='checkpoints/dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth'),
    ),
    decode_head=dict(in_channels=[1024], channels=1024),
)
