# The recipe is the ViTAE authors': 25 epochs over COCO repeated four times.
_base_ = './mask-rcnn_plainvit-base-mae_lsj-100e_coco.py'

norm_cfg = dict(type='LayerNorm2d', eps=1e-5)
model = dict(
    backbone=dict(
        _delete_=True,
        type='ViTAE',
        arch='base',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/vitae_base_mae.pth'),
    ),
    neck=dict(halve_channels=False, norm_cfg=norm_cfg),
    rpn_head=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
train_dataloader = dict(
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',
        times=4,
        dataset=dict(
            type='CocoDataset',
            data_root=_base_.data_root,
            ann_file='annotations/instances_train2017.json',
            data_prefix=dict(img='train2017/'),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=_base_.train_pipeline,
        ),
    ),
)
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=25, val_interval=5)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', begin=0, end=25, milestones=[22, 24], gamma=0.1),
]
optim_wrapper = dict(
    paramwise_cfg=dict(
        flat_decay_mult=0.0, custom_keys=dict(rel_pos_h=dict(decay_mult=0.0), rel_pos_w=dict(decay_mult=0.0))
    )
)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1))
log_processor = dict(by_epoch=True)
