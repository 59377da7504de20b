# mask-rcnn_mpvit-tiny_fpn_mini-coco.py for images of four bands and 16 bits: red, green, blue and near infrared. Data:
# tools/dataset_converters/make_mini_coco.py data/mini-rgbn --near-infrared
_base_ = [
    '../_base_/models/mini_mask-rcnn_fpn.py',
    '../_base_/datasets/mini_coco_instance.py',
    '../_base_/schedules/mini_7e.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.data_preprocessors'])

model = dict(
    data_preprocessor=dict(
        _delete_=True,
        type='MultiChannelDetDataPreprocessor',
        # Those of ImageNet for red, green and blue, in units of 16 bits; near infrared as measured.
        mean=[31785, 29884, 26607, 13300],
        std=[15009, 14675, 14739, 10400],
        pad_mask=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        _delete_=True,
        type='MPViT',
        arch='tiny',
        in_channels=4,
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

# float32: PyTorch does not compute with unsigned 16-bit integers.
load_image = dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='tifffile', to_float32=True)
train_pipeline = [load_image, *_base_.train_pipeline[1:]]
test_pipeline = [load_image, *_base_.test_pipeline[1:]]
data_root = 'data/mini-rgbn/'
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=6)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=6, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
