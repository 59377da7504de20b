_base_ = './dinov2-small_linear-ms_8xb2-40k_ade20k-640x640.py'

model = dict(
    backbone=dict(
        arch='giant',
        ffn_type='swiglu',
        out_indices=(36, 37, 38, 39),
        frozen_stages=40,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth'),
    ),
    decode_head=dict(in_channels=[1536, 1536, 1536, 1536], channels=6144),
)
