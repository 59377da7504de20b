# The ViTDet authors' schedule for ViT-H in Detectron2: 75 epochs of COCO, which are 138,281 iterations of 64 images.
_base_ = './vitdet_100e.py'

train_cfg = dict(max_iters=138281)
# Unlike for ViT-B and ViT-L, norms and positions have weight decay.
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.9))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=138281, milestones=[122916, 133159], gamma=0.1),
]
