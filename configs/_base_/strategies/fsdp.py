# PyTorch's FSDP through MMEngine: parameters, gradients and optimizer states are sharded over all GPUs.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='ResumableFSDPStrategy',
    model_wrapper=dict(
        auto_wrap_policy='wrap_blocks',
        use_orig_params=True,  # required for layer-wise learning rates
    ),
    # Checkpoints hold the whole model, as without sharding.
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', offload_to_cpu=True, rank0_only=True),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', offload_to_cpu=True, rank0_only=True),
    ),
)
