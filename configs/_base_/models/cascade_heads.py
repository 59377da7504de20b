# Detectron2's newer Cascade R-CNN heads: four convolutions and a linear, boxes without classes. Configs
# that use them import mmvitzoo.models.heads.
cascade_box_heads = [
    dict(
        type='Shared4Conv1FCBBoxHead',
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        reg_class_agnostic=True,
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1 / centre, 1 / centre, 1 / size, 1 / size],
        ),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    )
    for centre, size in [(10, 5), (20, 10), (30, 15)]
]
cascade_roi_head = dict(
    type='Detectron2CascadeRoIHead',
    num_stages=3,
    # Detectron2 divides the gradient that leaves the heads, which reaches the backbone, not the heads' own.
    stage_loss_weights=[1 / 3, 1 / 3, 1 / 3],
)
cascade_train_cfg = [
    dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=overlap,
            neg_iou_thr=overlap,
            min_pos_iou=overlap,
            match_low_quality=False,
            ignore_iof_thr=-1,
        ),
        # Only the first stage samples, and adds the ground truth; the others keep what they get.
        sampler=dict(
            type='RandomSampler', num=512, pos_fraction=fraction, neg_pos_ub=-1, add_gt_as_proposals=fraction < 1
        ),
        mask_size=28,
        pos_weight=-1,
        debug=False,
    )
    for overlap, fraction in [(0.5, 0.25), (0.6, 1.0), (0.7, 1.0)]
]
