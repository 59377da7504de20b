# Customary: MMSegmentation's recipe for MAE. Patches of 14 x 14 pixels are resampled to 16 x 16, for strides 4 to 32.
# At 256 pixels they have the table's 16 x 16 positions.
_base_ = [
    'mmseg::_base_/models/upernet_vit-b16_ln_mln.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/upernet_160k_layer_decay.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.engine.layer_decay'])

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512), mean=[122.7709, 116.746, 104.0937], std=[68.5005, 66.6322, 70.3232]),
    backbone=dict(
        _delete_=True,
        type='TimmBackbone',
        model_name='eva02_base_patch14_224.mim_in22k',
        patch_size=16,
        img_size=256,
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/timm/eva02_base_patch14_224.mim_in22k/resolve/main/model.safetensors',
        ),
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=768, num_outs=4),
    decode_head=dict(in_channels=[256, 256, 256, 256], num_classes=150),
    auxiliary_head=dict(in_channels=256, in_index=2, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
