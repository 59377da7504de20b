"""Evaluates a model of MMDetection, MMSegmentation or MMPretrain: test.py CONFIG CHECKPOINT [ARGUMENTS].

The arguments are those of the toolbox that the config is for; `test.py CONFIG -h` lists them.
"""

from mmvitzoo.engine import run_toolbox_script

if __name__ == '__main__':
    run_toolbox_script('test')
