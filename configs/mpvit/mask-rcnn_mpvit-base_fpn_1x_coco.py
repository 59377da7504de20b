_base_ = './mask-rcnn_mpvit-tiny_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='checkpoints/mpvit_base.pth'),
    ),
    neck=dict(in_channels=[224, 368, 480, 480]),
)
