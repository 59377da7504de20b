_base_ = './retinanet_scalablevit-small_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='large', drop_path_rate=0.4, init_cfg=dict(checkpoint='checkpoints/scalablevit_large.pth')),
    neck=dict(in_channels=[256, 512, 1024]),
)
