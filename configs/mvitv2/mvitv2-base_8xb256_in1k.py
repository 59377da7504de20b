# MMPretrain's recipe.
_base_ = 'mmpretrain::mvit/mvitv2-base_8xb256_in1k.py'
custom_imports = dict(imports=['mmvitzoo'])

model = dict(backbone=dict(type='MViTv2'))
