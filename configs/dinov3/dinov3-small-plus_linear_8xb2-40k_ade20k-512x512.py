_base_ = './dinov3-small_linear_8xb2-40k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        ffn_type='swiglu', init_cfg=dict(checkpoint='checkpoints/dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth')
    ),
)
