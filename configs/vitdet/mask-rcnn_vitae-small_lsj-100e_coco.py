# The authors count 12 layers for the decay of the learning rate, here it is the 14 blocks.
_base_ = './mask-rcnn_vitae-base-mae_lsj-100e_coco.py'

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/vitae_small.pth')),
    neck=dict(in_channels=384),
)
