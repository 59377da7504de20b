# Tree crowns on aerial photographs, which tools/dataset_converters/make_tree_crowns.py writes.
dataset_type = 'CocoDataset'
data_root = 'data/tree_crowns/'
metainfo = dict(classes=('tree',), palette=[(255, 193, 7)])
scale_factor = 1.05  # tiles of 336 pixels, 24 patches of 14
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale_factor=scale_factor),
    # A photograph from above has no upper side.
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=scale_factor),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]


train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type='CocoMetric', ann_file=data_root + 'annotations/instances_val.json', metric='bbox')
# The test adds two photographs of other places.
places = ('val', 'yell', 'osbs')
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(
                type=dataset_type,
                data_root=data_root,
                metainfo=metainfo,
                ann_file=f'annotations/instances_{place}.json',
                data_prefix=dict(img=f'{place}/'),
                test_mode=True,
                pipeline=test_pipeline,
            )
            for place in places
        ],
    ),
)
test_evaluator = dict(
    type='MultiDatasetsEvaluator',
    metrics=[
        dict(type='CocoMetric', ann_file=f'{data_root}annotations/instances_{place}.json', metric='bbox')
        for place in places
    ],
    dataset_prefixes=places,
)
