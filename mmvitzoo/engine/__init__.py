"""Training utilities: config loading, toolbox scripts, exact resume, sharding and LoRA."""

from .exact_resume import ExactResumeHook
from .launch import read_config, run_toolbox_script
from .lora import add_lora, build_lora_backbone, merge_lora
from .sharding import ResumableFSDPStrategy, wrap_blocks

__all__ = [
    'ExactResumeHook',
    'ResumableFSDPStrategy',
    'add_lora',
    'build_lora_backbone',
    'merge_lora',
    'read_config',
    'run_toolbox_script',
    'wrap_blocks',
]
