# Customary: MMSegmentation's recipe for ConvNeXt. Its decay of 0.9 for each stage is 0.98 for each of the 36 blocks.
_base_ = [
    'mmseg::_base_/models/upernet_convnext.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/upernet_160k_layer_decay.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.engine.layer_decay'])

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='TimmBackbone',
        model_name='convnextv2_base.fcmae_ft_in22k_in1k',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/convnextv2/im22k/convnextv2_base_22k_224_ema.pt',
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=150),
    auxiliary_head=dict(in_channels=512, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.98))
