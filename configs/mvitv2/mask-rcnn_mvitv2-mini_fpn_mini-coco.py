# Trains from scratch in minutes on two CPU cores.
_base_ = '../mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MViTv2',
        arch=dict(embed_dims=48, num_layers=7, num_heads=1, downscale_indices=(1, 3, 6)),
        out_indices=(0, 1, 2, 3),
        window_attention=True,
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)

train_dataloader = dict(batch_size=2)
max_epochs = 7
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
