_base_ = './dinov3-small_linear_8xb2-40k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='checkpoints/dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth')),
    decode_head=dict(in_channels=[768], channels=768),
)
