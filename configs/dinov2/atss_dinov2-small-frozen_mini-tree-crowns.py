# Tree crowns: DINOv2-S stays as it is; only the pyramid and the head are trained.
_base_ = './atss_plainvit-small-dinov2_mini-tree-crowns.py'

model = dict(backbone=dict(frozen_stages=12))
