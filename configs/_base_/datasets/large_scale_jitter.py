# Crops of 1024 x 1024 pixels from images at 0.1 to 2 times that size.
image_size = (1024, 1024)
large_scale_jitter = [
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type='RandomCrop',
        crop_type='absolute',
        crop_size=image_size,
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
]
# RoI heads read masks, which are padded to the size of the image.
pad_to_image_size = [dict(type='BatchFixedSizePad', size=image_size, pad_mask=True)]
