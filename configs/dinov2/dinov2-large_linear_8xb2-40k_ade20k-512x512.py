_base_ = './dinov2-small_linear_8xb2-40k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='large',
        frozen_stages=24,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth'),
    ),
    decode_head=dict(in_channels=[1024], channels=1024),
)
