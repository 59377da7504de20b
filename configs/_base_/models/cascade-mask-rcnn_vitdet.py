# ViTDet's Cascade Mask R-CNN: its Mask R-CNN with three box heads.
_base_ = './mask-rcnn_vitdet.py'

box_head = dict(
    type='Shared4Conv1FCBBoxHead',
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    norm_cfg=_base_.norm_cfg,
    reg_class_agnostic=True,
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type='L1Loss', loss_weight=1.0),
)
coders = [
    dict(
        type='DeltaXYWHBBoxCoder',
        target_means=[0.0, 0.0, 0.0, 0.0],
        target_stds=[1 / centre, 1 / centre, 1 / size, 1 / size],
    )
    for centre, size in [(10, 5), (20, 10), (30, 15)]
]
model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        # Detectron2 scales the gradient that leaves the heads, and Adam does not see the heads' own.
        stage_loss_weights=[1 / 3, 1 / 3, 1 / 3],
        bbox_head=[dict(bbox_coder=coder, **box_head) for coder in coders],
    ),
    train_cfg=dict(
        rcnn=[
            dict(
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=overlap,
                    neg_iou_thr=overlap,
                    min_pos_iou=overlap,
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
                sampler=dict(type='RandomSampler', num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            )
            for overlap in (0.5, 0.6, 0.7)
        ]
    ),
)
