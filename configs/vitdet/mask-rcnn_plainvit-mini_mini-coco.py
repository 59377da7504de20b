# ViTDet in small: trains from scratch on the demonstration data in minutes on two CPU cores.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/mini_coco_instance.py',
    '../_base_/schedules/mini_7e.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads'])

norm_cfg = dict(type='LayerNorm2d', eps=1e-6)
model = dict(
    backbone=dict(
        _delete_=True,
        type='PlainViT',
        arch=dict(embed_dims=128, num_layers=6, num_heads=4, mlp_ratio=4),
        img_size=(160, 192),
        patch_size=8,
        final_norm=False,
        with_cls_token=False,
        window_size=7,
        global_attn_indexes=(1, 3, 5),
        use_rel_pos=True,
    ),
    neck=dict(
        _delete_=True,
        type='SimpleFeaturePyramid',
        in_channels=128,
        out_channels=96,
        scale_factors=(1, 0.5),
        num_outs=3,
    ),
    rpn_head=dict(
        type='NormRPNHead',
        in_channels=96,
        feat_channels=96,
        num_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(scales=[4], strides=[8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=96, featmap_strides=[8, 16]),
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',
            in_channels=96,
            conv_out_channels=64,
            fc_out_channels=256,
            num_classes=10,
            norm_cfg=norm_cfg,
        ),
        mask_roi_extractor=dict(out_channels=96, featmap_strides=[8, 16]),
        mask_head=dict(num_convs=2, in_channels=96, conv_out_channels=96, num_classes=10, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=250, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=250, max_per_img=100), rcnn=dict(max_per_img=20)),
)

train_cfg = dict(max_epochs=6)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=6, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
