_base_ = [
    '../_base_/models/mask-rcnn_vitdet.py',
    '../_base_/datasets/lvis_v1_lsj_1024.py',
    '../_base_/schedules/vitdet_100e_lvis.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        arch='large',
        global_attn_indexes=(5, 11, 17, 23),
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth'),
    ),
    neck=dict(in_channels=1024),
    roi_head=dict(
        bbox_head=dict(
            num_classes=1203,
            loss_cls=dict(
                _delete_=True,
                type='FederatedLoss',
                num_classes=1203,
                ann_file='data/lvis_v1/annotations/lvis_v1_train.json',
            ),
        ),
        mask_head=dict(num_classes=1203),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.02, max_per_img=300)),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
