# The authors' layer decay counts 12 layers, here it counts the 14 blocks.
_base_ = './mask-rcnn_vitae-base-mae_lsj-100e_coco.py'

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/vitae_small.pth')),
    neck=dict(in_channels=384),
)
