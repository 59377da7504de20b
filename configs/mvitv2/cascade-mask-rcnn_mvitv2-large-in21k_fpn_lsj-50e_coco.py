# ImageNet-21k weights have a class token, which the authors' detectors start without; see the README.
_base_ = './cascade-mask-rcnn_mvitv2-huge-in21k_fpn_lsj-3x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        with_cp=False,
        init_cfg=dict(checkpoint='checkpoints/MViTv2_L_in21k_without-token.pth'),
    ),
    neck=dict(in_channels=[144, 288, 576, 1152]),
)

max_iters = 92187
train_cfg = dict(max_iters=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=max_iters, milestones=[81944, 88773], gamma=0.1),
]
