# Customary, since the authors published no segmentation: Swin's recipe.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='MViTv2',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        window_attention=True,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_T_in1k.pyth'
        ),
    )
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(rel_pos=dict(decay_mult=0.0))))
