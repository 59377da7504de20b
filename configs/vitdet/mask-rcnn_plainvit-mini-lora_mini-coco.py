# The small classifier of configs/vit/plainvit-mini_mini-classes.py, in timm's names, with low-rank updates of all
# linear layers; the README has the commands.
_base_ = './mask-rcnn_plainvit-mini_mini-coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='LoRABackbone',
        module=dict(
            _base_.model.backbone,
            pretrain_img_size=(56, 48),
            init_cfg=dict(type='Pretrained', checkpoint='checkpoints/plainvit_mini_timm.pth'),
        ),
        targets=[dict(type='qkv'), dict(type='proj'), dict(type='fc1'), dict(type='fc2')],
        rank=8,
        alpha=16,
    ),
)
