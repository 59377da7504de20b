# Customary: MMSegmentation's recipe for Swin. As in timm, no weight decay of the position MLP and the attention's
# scale.
_base_ = 'mmseg::swin/swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['mmvitzoo'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='TimmBackbone',
        model_name='swinv2_base_window8_256.ms_in1k',
        always_partition=True,  # shifts windows in the last stage, too, whose map is one window at 256 x 256
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/swinv2_base_patch4_window8_256.pth',
        ),
    )
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(cpb_mlp=dict(decay_mult=0.0), logit_scale=dict(decay_mult=0.0)))
)
