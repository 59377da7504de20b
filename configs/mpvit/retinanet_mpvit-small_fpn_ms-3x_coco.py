_base_ = './retinanet_mpvit-tiny_fpn_ms-3x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='https://dl.dropbox.com/s/y3dnmmy8h4npz7a/mpvit_small.pth'),
    ),
    neck=dict(in_channels=[128, 216, 288, 288]),
)
