# Customary: MMSegmentation's recipe for MAE, with ViTDet's layer decay of a model with 24 blocks.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
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
        model_name='sam2_hiera_base_plus.fb_r896_2pt1',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/timm/sam2_hiera_base_plus.fb_r896_2pt1/resolve/main/model.safetensors',
        ),
    ),
    decode_head=dict(in_channels=[112, 224, 448, 896], num_classes=150),
    auxiliary_head=dict(in_channels=448, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
