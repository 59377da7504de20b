"""Starting the toolboxes' own training and test scripts."""

from .launch import run_toolbox_script

__all__ = ['run_toolbox_script']
