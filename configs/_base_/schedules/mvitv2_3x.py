# The MViTv2 authors' 3x schedule in Detectron2: 36 epochs of COCO, which are 67,500 iterations of 64 images.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=67500, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=1.6e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(rel_pos=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=67500, milestones=[52500, 62500], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=64)
