# COCO with large-scale jitter, 64 images per iteration on 8 GPUs.
_base_ = ['mmdet::_base_/datasets/coco_instance.py', './large_scale_jitter.py']

train_pipeline = _base_.lsj_train_pipeline
test_pipeline = _base_.lsj_test_pipeline
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(type='InfiniteSampler'),
    batch_sampler=None,
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
