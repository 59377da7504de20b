# Tree crowns: the same model from random weights.
_base_ = './atss_dinov2-small_mini-tree-crowns.py'

# All layers have the same learning rate, and layer scale starts from 1: nothing is known that should be kept.
model = dict(backbone=dict(layer_scale_init_value=1.0, init_cfg=None))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=1.0))
