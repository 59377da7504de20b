# Customary, since the authors published no RetinaNet: MPViT's 1x schedule with the weight decay and the drop path rate
# of the authors' Mask R-CNN.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_90k_adamw.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='MViTv2',
        arch='tiny',
        out_indices=(1, 2, 3),  # the neck does not use the first map, whose norm would have no gradient
        window_attention=True,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_T_in1k.pyth'
        ),
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0, relu_before_extra_convs=True),  # as in Detectron2
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(rel_pos=dict(decay_mult=0.0))),
)
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000, max_keep_ckpts=3))
log_processor = dict(by_epoch=False)
