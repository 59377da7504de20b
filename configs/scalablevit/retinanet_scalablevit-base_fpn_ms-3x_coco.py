_base_ = './retinanet_scalablevit-small_fpn_ms-3x_coco.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.3, init_cfg=dict(checkpoint='checkpoints/scalablevit_base.pth')),
    neck=dict(in_channels=[192, 384, 768]),
)
