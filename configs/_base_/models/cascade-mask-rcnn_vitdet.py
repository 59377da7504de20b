# ViTDet's Cascade Mask R-CNN: its Mask R-CNN with three box heads.
_base_ = ['./mask-rcnn_vitdet.py', './cascade_heads.py']

model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        bbox_head=[dict(head, norm_cfg=_base_.norm_cfg) for head in _base_.cascade_box_heads],
        **_base_.cascade_roi_head,
    ),
    train_cfg=dict(rcnn=_base_.cascade_train_cfg),
)
