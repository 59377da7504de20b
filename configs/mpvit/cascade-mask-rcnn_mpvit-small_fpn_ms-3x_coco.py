_base_ = ['./mask-rcnn_mpvit-small_fpn_ms-3x_coco.py', '../_base_/models/cascade_heads.py']
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads'])

# Detectron2's heads of two linears.
model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        bbox_head=[dict(head, type='Shared2FCBBoxHead') for head in _base_.cascade_box_heads],
        **_base_.cascade_roi_head,
    ),
    train_cfg=dict(rcnn=_base_.cascade_train_cfg),
)
