# mask-rcnn_mpvit-tiny_fpn_mini-coco.py for images of one channel: the demonstration data, read in gray.
_base_ = [
    '../_base_/models/mini_mask-rcnn_fpn.py',
    '../_base_/datasets/mini_coco_instance.py',
    '../_base_/schedules/mini_7e.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    # The stock data preprocessor takes one or three channels.
    data_preprocessor=dict(mean=[116], std=[57], bgr_to_rgb=False),
    backbone=dict(
        _delete_=True,
        type='MPViT',
        arch='tiny',
        in_channels=1,
        init_cfg=dict(
            type='Kaiming',
            layer=['Conv2d', 'Linear'],
            a=2.23606797749979,
            distribution='uniform',
            mode='fan_in',
            nonlinearity='leaky_relu',
        ),
    ),
    neck=dict(in_channels=[96, 176, 216, 216]),
)

load_image = dict(type='LoadImageFromFile', color_type='grayscale')
train_pipeline = [load_image, *_base_.train_pipeline[1:]]
test_pipeline = [load_image, *_base_.test_pipeline[1:]]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=6)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=6, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
