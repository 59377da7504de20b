# Windows in all blocks; convolutions carry information across them.
_base_ = './mask-rcnn_plainvit-base-mae_lsj-100e_coco.py'

model = dict(backbone=dict(global_attn_indexes=(), residual_block_indexes=(2, 5, 8, 11)))
