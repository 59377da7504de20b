# The recipe is the paper's, as released in Detectron2. LayerNorm in the RPN is the paper's; the
# released weights have none, see the README.
_base_ = [
    '../_base_/models/mask-rcnn_vitdet.py',
    '../_base_/datasets/coco_lsj_1024.py',
    '../_base_/schedules/vitdet_100e.py',
    '../_base_/iter_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads', 'mmvitzoo.engine.layer_decay'])
