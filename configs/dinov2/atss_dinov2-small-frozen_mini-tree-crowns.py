# Tree crowns: DINOv2-S stays as it is; only the pyramid and the head are trained.
_base_ = './atss_dinov2-small_mini-tree-crowns.py'

model = dict(backbone=dict(frozen_stages=12))

# An iteration takes less than half the time of one that trains the backbone: the minutes are the same.
max_iters = 240
train_cfg = dict(max_iters=max_iters, val_interval=80)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', T_max=max_iters, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
