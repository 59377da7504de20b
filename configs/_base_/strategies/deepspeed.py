# DeepSpeed's ZeRO stage 2 through MMEngine: gradients and optimizer states are sharded over all GPUs. Requires
# `pip install deepspeed` and optim_wrapper=dict(type='DeepSpeedOptimWrapper').
runner_type = 'FlexibleRunner'
strategy = dict(
    type='DeepSpeedStrategy',
    bf16=dict(enabled=True),
    inputs_to_half=['inputs'],
    zero_optimization=dict(stage=2, overlap_comm=True, contiguous_gradients=True),
)
