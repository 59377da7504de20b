# The recipe is MMSegmentation's, which has stochastic depth in the other rows, but not in this one.
_base_ = [
    '../_base_/models/upernet_plainvit.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/ade20k_80k_adamw.py',
]
custom_imports = dict(imports=['mmvitzoo'])

train_dataloader = dict(batch_size=2)
