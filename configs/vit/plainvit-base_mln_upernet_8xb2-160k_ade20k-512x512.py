_base_ = './plainvit-base_mln_upernet_8xb2-80k_ade20k-512x512.py'

max_iters = 160000
train_cfg = dict(max_iters=max_iters, val_interval=16000)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=max_iters),
]
default_hooks = dict(checkpoint=dict(interval=16000))
