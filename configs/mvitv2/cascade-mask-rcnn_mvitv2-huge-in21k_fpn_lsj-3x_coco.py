# ImageNet-21k weights have a class token, which the authors' detectors start without; see the README.
_base_ = ['./cascade-mask-rcnn_mvitv2-tiny_fpn_ms-3x_coco.py', '../_base_/datasets/large_scale_jitter.py']

model = dict(
    # RoI heads read masks, which are padded to the size of the image.
    data_preprocessor=dict(batch_augments=[dict(type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True)]),
    backbone=dict(
        arch='huge',
        drop_path_rate=0.6,
        with_cp=True,
        init_cfg=dict(checkpoint='checkpoints/MViTv2_H_in21k_without-token.pth'),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
train_pipeline = _base_.lsj_train_pipeline
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
