# Customary: MMSegmentation's recipe for MAE, layer decay and drop path of czczup/ViT-Adapter. Patches of 14 x 14
# pixels are resampled to 16 x 16, for strides 4 to 32. At 592 pixels they have the table's 37 x 37 positions.
_base_ = [
    'mmseg::_base_/models/upernet_vit-b16_ln_mln.py',
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
        type='PlainViT',
        arch='small',
        img_size=592,
        patch_size=16,
        norm_outputs=True,
        interpolate_offset=0.1,
        layer_scale_init_value=1e-5,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth',
        ),
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=384, num_outs=4),
    decode_head=dict(in_channels=[256, 256, 256, 256], num_classes=150),
    auxiliary_head=dict(in_channels=256, in_index=2, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
