# Starts from the small classifier of plainvit-mini_mini-classes.py in timm's names; the README has the commands.
_base_ = './plainvit-mini_mln_upernet_mini-coco.py'

model = dict(
    backbone=dict(
        pretrain_img_size=(56, 48),
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint='checkpoints/plainvit_mini_timm.pth'),
    ),
)
