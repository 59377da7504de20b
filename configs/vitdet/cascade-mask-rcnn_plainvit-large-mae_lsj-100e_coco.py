_base_ = [
    '../_base_/models/mask-rcnn_vitdet.py',
    '../_base_/models/cascade_heads.py',
    '../_base_/datasets/coco_lsj_1024.py',
    '../_base_/schedules/vitdet_100e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='CascadeRCNN',
    backbone=dict(
        arch='large',
        global_attn_indexes=(5, 11, 17, 23),
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth'),
    ),
    neck=dict(in_channels=1024),
    roi_head=dict(
        type='Detectron2CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=_base_.cascade_stage_loss_weights,
        bbox_head=[dict(head, norm_cfg=_base_.norm_cfg) for head in _base_.cascade_bbox_heads],
    ),
    train_cfg=dict(rcnn=_base_.cascade_train_cfg),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
