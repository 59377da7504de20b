# The ViTDet authors' schedule for LVIS in Detectron2: 100 epochs, which are 156,250 iterations of 64 images.
_base_ = './vitdet_100e.py'

train_cfg = dict(max_iters=156250, val_interval=30000)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=156250, milestones=[138889, 150463], gamma=0.1),
]
