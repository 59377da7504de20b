# The authors' recipe, as released in Detectron2. The RPN has LayerNorm as in the paper; the released weights have none
# there, see the README.
_base_ = [
    '../_base_/models/mask-rcnn_vitdet.py',
    '../_base_/datasets/coco_lsj_1024.py',
    '../_base_/schedules/vitdet_100e.py',
    '../_base_/default_runtime.py',
]
