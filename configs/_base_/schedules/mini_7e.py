# Detectors on the demonstration data: minutes on two CPU cores.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=7, val_interval=3)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=7, by_epoch=True, convert_to_iter_based=True),
]
randomness = dict(seed=0)
