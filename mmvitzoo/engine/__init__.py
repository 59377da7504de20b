"""Reading configs, and starting the toolboxes' own training and test scripts."""

from .launch import read_config, run_toolbox_script

__all__ = ['read_config', 'run_toolbox_script']
