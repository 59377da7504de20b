_base_ = ['../mask-rcnn_plainvit-large-mae_lsj-100e_coco.py', '../../_base_/strategies/fsdp.py']

optim_wrapper = dict(use_fsdp=True)
