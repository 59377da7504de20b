# The authors' recipe, as released in Detectron2: sigmoid scores with a federated loss, images of rare classes repeated.
_base_ = [
    '../_base_/models/mask-rcnn_vitdet.py',
    '../_base_/datasets/lvis_v1_lsj_1024.py',
    '../_base_/schedules/vitdet_100e_lvis.py',
    '../_base_/default_runtime.py',
]

model = dict(
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
