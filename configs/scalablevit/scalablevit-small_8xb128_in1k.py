# The recipe is the repository's default, which is that of MPViT but for the head, drop path and clipping.
_base_ = '../mpvit/mpvit-tiny_8xb128_in1k.py'

model = dict(
    backbone=dict(_delete_=True, type='ScalableViT', arch='small', out_indices=(3,), drop_path_rate=0.2),
    head=dict(
        type='StackedLinearClsHead',
        in_channels=512,
        mid_channels=[4096],
        norm_cfg=dict(type='LN', eps=1e-6),
        act_cfg=dict(type='GELU'),
    ),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
