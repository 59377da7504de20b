# Starts from the small classifier of configs/vit/plainvit-mini_mini-classes.py in timm's names; the README has the
# commands.
_base_ = './mask-rcnn_plainvit-mini_mini-coco.py'

model = dict(
    backbone=dict(
        pretrain_img_size=(56, 48),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/plainvit_mini_timm.pth'),
    ),
)
