# All blocks attend in windows, and convolutions carry information across them.
_base_ = [
    '../_base_/models/mask-rcnn_vitdet.py',
    '../_base_/datasets/coco_lsj_1024.py',
    '../_base_/schedules/vitdet_100e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(global_attn_indexes=(), residual_block_indexes=(2, 5, 8, 11)))
