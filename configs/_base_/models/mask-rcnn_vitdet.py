# ViTDet's Mask R-CNN: MMDetection's with a plain backbone, a simple feature pyramid, and LayerNorm after the hidden
# convolutions of the heads.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads', 'mmvitzoo.engine.layer_decay'])

norm_cfg = dict(type='LayerNorm2d', eps=1e-6)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type='PlainViT',
        arch='base',
        img_size=1024,
        pretrain_img_size=224,
        final_norm=False,
        with_cls_token=False,
        window_size=14,
        global_attn_indexes=(2, 5, 8, 11),
        use_rel_pos=True,
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth'
        ),
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=768),
    rpn_head=dict(type='NormRPNHead', num_convs=2, norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
