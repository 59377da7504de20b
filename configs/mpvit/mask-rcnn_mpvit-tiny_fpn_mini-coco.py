# Trains from scratch in minutes on two CPU cores; `make demo` runs it.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/mini_coco_instance.py',
    '../_base_/mini_det_runtime.py',
    '../_base_/mini_init.py',
]
custom_imports = dict(imports=['mmvitzoo'])

# Heads a third as wide as the stock ones, for small images of ten classes.
channels = 96
model = dict(
    backbone=dict(
        _delete_=True,
        type='MPViT',
        arch='tiny',
        init_cfg=_base_.mini_init_cfg,
    ),
    neck=dict(in_channels=[96, 176, 216, 216], out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[6])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=10),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=250, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=250, max_per_img=100), rcnn=dict(max_per_img=20)),
)

# A batch of four takes 20% less time per image than one of two; the learning rate is tuned for it.
train_dataloader = dict(batch_size=4)
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
