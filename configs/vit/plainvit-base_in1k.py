# Evaluates timm's classifiers with their mean, deviation, bicubic resize to 248 pixels and crop of 224 pixels. DeiT's
# classifiers need ImageNet's mean and deviation; see the README. Customary: the training recipe, which is Swin's.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs128_poolformer_small_224.py',  # bicubic, crop ratio 0.9
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='PlainViT', arch='base', out_type='cls_token'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
