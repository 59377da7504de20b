_base_ = './dinov2-small_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(drop_path_rate=0.0, frozen_stages=12))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=1.0))
