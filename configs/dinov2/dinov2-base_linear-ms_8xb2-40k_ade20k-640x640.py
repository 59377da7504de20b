_base_ = './dinov2-small_linear-ms_8xb2-40k_ade20k-640x640.py'

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth'),
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768], channels=3072),
)
