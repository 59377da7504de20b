# The semantic maps of the demonstration data: background and ten digits.
metainfo = dict(
    classes=('background', *'0123456789'),
    palette=[[0, 0, 0]] + [[25 * i, 255 - 25 * i, 120 + 13 * i] for i in range(10)],
)
data_root = 'data/mini/'
load = [dict(type='LoadImageFromFile')]
train_pipeline = [
    *load,
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(160, 160)),
    dict(type='PackSegInputs'),
]
test_pipeline = [*load, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='train', seg_map_path='semantic/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
