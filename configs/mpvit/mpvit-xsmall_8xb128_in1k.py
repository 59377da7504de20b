_base_ = './mpvit-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='xsmall'), head=dict(in_channels=256))
