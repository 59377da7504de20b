"""Trains a model of MMDetection, MMSegmentation or MMPretrain: train.py CONFIG [ARGUMENTS].

The arguments are those of the toolbox of the config; `train.py CONFIG -h` lists them.
"""

import os

# Set before torch is imported: waiting OpenMP threads spin only briefly. On a machine with other busy processes,
# unlimited spinning makes a training ten times slower.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.update(OMP_WAIT_POLICY='PASSIVE', GOMP_SPINCOUNT='1000')

from mmvitzoo.engine import run_toolbox_script

if __name__ == '__main__':
    run_toolbox_script('train')
