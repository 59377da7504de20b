"""Training utilities: config loading, toolbox scripts, exact resume and sharding."""

from .exact_resume import ExactResumeHook
from .launch import read_config, run_toolbox_script
from .sharding import ResumableFSDPStrategy, wrap_blocks

__all__ = ['ExactResumeHook', 'ResumableFSDPStrategy', 'read_config', 'run_toolbox_script', 'wrap_blocks']
