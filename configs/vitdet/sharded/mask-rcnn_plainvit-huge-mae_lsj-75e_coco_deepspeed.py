_base_ = [
    '../../_base_/models/mask-rcnn_vitdet.py',
    '../../_base_/datasets/coco_lsj_1024.py',
    '../../_base_/schedules/vitdet_75e.py',
    '../../_base_/strategies/deepspeed.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        arch='huge',
        global_attn_indexes=(7, 15, 23, 31),
        drop_path_rate=0.5,
        init_cfg=dict(
            checkpoint='https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MAE/mae_pretrain_vit_huge_p14to16.pth'
        ),
    ),
    neck=dict(in_channels=1280),
)
optim_wrapper = dict(type='DeepSpeedOptimWrapper')
