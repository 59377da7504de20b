_base_ = './plainvit-base_in1k.py'

model = dict(backbone=dict(arch='tiny'), head=dict(in_channels=192))
