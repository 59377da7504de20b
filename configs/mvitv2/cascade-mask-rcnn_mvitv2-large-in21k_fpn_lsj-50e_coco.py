# ImageNet-21k weights have a class token, which the authors' detectors start without; see the README.
_base_ = ['./cascade-mask-rcnn_mvitv2-tiny_fpn_ms-3x_coco.py', '../_base_/datasets/large_scale_jitter.py']

model = dict(
    # RoI heads read masks, which are padded to the size of the image.
    data_preprocessor=dict(batch_augments=[dict(type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True)]),
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='checkpoints/MViTv2_L_in21k_without-token.pth'),
    ),
    neck=dict(in_channels=[144, 288, 576, 1152]),
)
train_pipeline = _base_.lsj_train_pipeline
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

# 50 epochs of COCO are 92,187 iterations of 64 images.
train_cfg = dict(max_iters=92187)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=92187, milestones=[81944, 88773], gamma=0.1),
]
