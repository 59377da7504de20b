_base_ = [
    '../../_base_/models/mask-rcnn_vitdet.py',
    '../../_base_/datasets/coco_lsj_1024.py',
    '../../_base_/schedules/vitdet_100e.py',
    '../../_base_/strategies/deepspeed.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        arch='large',
        global_attn_indexes=(5, 11, 17, 23),
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth'),
    ),
    neck=dict(in_channels=1024),
)
optim_wrapper = dict(type='DeepSpeedOptimWrapper', paramwise_cfg=dict(layer_decay_rate=0.8))
