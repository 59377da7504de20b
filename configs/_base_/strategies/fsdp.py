# Parameters, gradients and optimizer states in shards on all GPUs: PyTorch's FSDP through MMEngine.
# Checkpoints hold the whole model, as without shards.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='FSDPStrategy',
    state_dict_cfg='full',
    model_wrapper=dict(
        auto_wrap_policy='wrap_blocks',
        use_orig_params=True,  # without it there are no learning rates by layer
    ),
)
