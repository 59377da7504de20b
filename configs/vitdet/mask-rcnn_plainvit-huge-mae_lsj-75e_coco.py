_base_ = './mask-rcnn_plainvit-base-mae_lsj-100e_coco.py'

model = dict(
    backbone=dict(
        arch='huge',
        global_attn_indexes=(7, 15, 23, 31),
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='checkpoints/mae_pretrain_vit_huge_p14to16.pth'),
    ),
    neck=dict(in_channels=1280),
)
max_iters = 138281
train_cfg = dict(max_iters=max_iters)
# Norms and positions decay here, too.
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.9))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=max_iters, milestones=[122916, 133159], gamma=0.1),
]
