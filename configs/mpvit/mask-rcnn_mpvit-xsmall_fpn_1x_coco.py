_base_ = './mask-rcnn_mpvit-tiny_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='xsmall',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='https://dl.dropbox.com/s/vvpq2m474g8tvyq/mpvit_xsmall.pth'),
    ),
    neck=dict(in_channels=[128, 192, 256, 256]),
)
