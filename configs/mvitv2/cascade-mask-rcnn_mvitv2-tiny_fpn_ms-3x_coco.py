_base_ = ['./mask-rcnn_mvitv2-tiny_fpn_ms-3x_coco.py', '../_base_/models/cascade_heads.py']
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads'])

# The authors' BatchNorm weighs every image of a batch alike, whatever its number of regions;
# SyncBN weighs regions.
norm_cfg = dict(type='SyncBN')
model = dict(
    type='CascadeRCNN',
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[dict(head, norm_cfg=norm_cfg) for head in _base_.cascade_box_heads],
        mask_head=dict(norm_cfg=norm_cfg),
        **_base_.cascade_roi_head,
    ),
    train_cfg=dict(rcnn=_base_.cascade_train_cfg),
)
