# The recipe is the paper's, as released in Detectron2: 156,250 iterations of 64 images, sigmoid
# scores with a federated loss, images of rare classes repeated.
_base_ = [
    '../_base_/models/mask-rcnn_vitdet.py',
    '../_base_/datasets/lvis_v1_lsj_1024.py',
    '../_base_/schedules/vitdet_100e.py',
    '../_base_/iter_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.models.heads', 'mmvitzoo.engine.layer_decay'])

num_classes = 1203
model = dict(
    roi_head=dict(
        bbox_head=dict(
            num_classes=num_classes,
            loss_cls=dict(
                _delete_=True,
                type='FederatedLoss',
                num_classes=num_classes,
                ann_file='data/lvis_v1/annotations/lvis_v1_train.json',
            ),
        ),
        mask_head=dict(num_classes=num_classes),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.02, max_per_img=300)),
)
max_iters = 156250
train_cfg = dict(max_iters=max_iters, val_interval=30000)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=max_iters, milestones=[138889, 150463], gamma=0.1),
]
