_base_ = './cascade-mask-rcnn_mvitv2-tiny_fpn_ms-3x_coco.py'

model = dict(
    backbone=dict(
        arch='small', init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_S_in1k.pyth')
    )
)
