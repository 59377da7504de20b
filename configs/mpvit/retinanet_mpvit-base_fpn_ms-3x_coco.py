_base_ = './retinanet_mpvit-tiny_fpn_ms-3x_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='https://dl.dropbox.com/s/la8w31m0apj2830/mpvit_base.pth'),
    ),
    neck=dict(in_channels=[224, 368, 480, 480]),
)
