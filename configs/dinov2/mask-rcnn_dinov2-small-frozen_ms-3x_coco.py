_base_ = './mask-rcnn_dinov2-small_ms-3x_coco.py'

model = dict(backbone=dict(drop_path_rate=0.0, frozen_stages=12))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=1.0))
