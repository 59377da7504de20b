"""Trains a model of MMDetection, MMSegmentation or MMPretrain: train.py CONFIG [ARGUMENTS].

The arguments are those of the toolbox that the config is for; `train.py CONFIG -h` lists them.
"""

from mmvitzoo.engine import run_toolbox_script

if __name__ == '__main__':
    run_toolbox_script('train')
