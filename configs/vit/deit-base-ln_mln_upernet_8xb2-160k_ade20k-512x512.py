_base_ = './plainvit-base_mln_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        final_norm=True,
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth'),
    )
)
