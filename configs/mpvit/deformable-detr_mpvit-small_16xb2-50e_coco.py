# The authors' recipe, except for the drop path rate, which is their other detectors'.
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='MPViT',
        arch='small',
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(type='Pretrained', checkpoint='https://dl.dropbox.com/s/y3dnmmy8h4npz7a/mpvit_small.pth'),
    ),
    neck=dict(in_channels=[216, 288, 288]),
)
