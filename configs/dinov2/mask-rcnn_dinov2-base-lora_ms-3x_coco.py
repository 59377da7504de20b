# The backbone stays as it is, but for updates of rank 8 of the queries, keys and values: 0.29 M of its 86 M parameters.
_base_ = './mask-rcnn_dinov2-small_ms-3x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='LoRABackbone',
        module=dict(
            _base_.model.backbone,
            arch='base',
            drop_path_rate=0.0,
            init_cfg=dict(
                type='Pretrained',
                checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth',
            ),
        ),
        targets=[dict(type='qkv')],
        rank=8,
        alpha=16,
    ),
    neck=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=1.0))
