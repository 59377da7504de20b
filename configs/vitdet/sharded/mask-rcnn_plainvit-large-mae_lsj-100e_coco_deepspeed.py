_base_ = ['../mask-rcnn_plainvit-large-mae_lsj-100e_coco.py', '../../_base_/strategies/deepspeed.py']

optim_wrapper = dict(type='DeepSpeedOptimWrapper')
