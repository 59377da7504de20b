# The recipe is the paper's, as released in Detectron2; see mask-rcnn_plainvit-base-mae_lsj-100e_coco.py.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_vitdet.py',
    '../_base_/datasets/coco_lsj_1024.py',
    '../_base_/schedules/vitdet_100e.py',
    '../_base_/iter_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads', 'mmvitzoo.engine.layer_decay'])
