# MMPretrain's recipe with the authors' weight decay, which MMPretrain has for MViTv2-B only.
_base_ = 'mmpretrain::mvit/mvitv2-tiny_8xb256_in1k.py'
custom_imports = dict(imports=['mmvitzoo'])

model = dict(backbone=dict(type='MViTv2'))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
