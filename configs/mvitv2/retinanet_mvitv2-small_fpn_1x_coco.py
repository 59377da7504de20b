_base_ = './retinanet_mvitv2-tiny_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='small', init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_S_in1k.pyth')
    )
)
