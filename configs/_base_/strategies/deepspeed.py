# Optimizer states and gradients in shards: DeepSpeed's ZeRO, second stage, through MMEngine. Needs
# `pip install deepspeed`, and optim_wrapper=dict(type='DeepSpeedOptimWrapper') beside it.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='DeepSpeedStrategy',
    bf16=dict(enabled=True),
    inputs_to_half=['inputs'],
    zero_optimization=dict(stage=2, overlap_comm=True, contiguous_gradients=True),
)
