# DETR's multi-scale augmentation. A config puts one of the two transforms into its training pipeline.
multi_scale_resize = dict(
    type='RandomChoiceResize',
    scales=[
        (480, 1333),
        (512, 1333),
        (544, 1333),
        (576, 1333),
        (608, 1333),
        (640, 1333),
        (672, 1333),
        (704, 1333),
        (736, 1333),
        (768, 1333),
        (800, 1333),
    ],
    keep_ratio=True,
)
# A random half of the images is cropped before the resize.
multi_scale_crop = dict(
    type='RandomChoice',
    transforms=[
        [multi_scale_resize],
        [
            dict(type='RandomChoiceResize', scales=[(400, 4200), (500, 4200), (600, 4200)], keep_ratio=True),
            dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
            multi_scale_resize,
        ],
    ],
)
