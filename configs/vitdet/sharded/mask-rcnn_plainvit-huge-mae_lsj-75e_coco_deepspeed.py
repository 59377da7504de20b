_base_ = ['../mask-rcnn_plainvit-huge-mae_lsj-75e_coco.py', '../../_base_/strategies/deepspeed.py']

optim_wrapper = dict(type='DeepSpeedOptimWrapper')
