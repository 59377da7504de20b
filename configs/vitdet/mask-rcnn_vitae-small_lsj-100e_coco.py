# The authors let the learning rate fall per stage, by 0.7 over 12 layers; here it falls per block.
_base_ = './mask-rcnn_vitae-base-mae_lsj-100e_coco.py'

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/vitae_small.pth')),
    neck=dict(in_channels=384),
)
