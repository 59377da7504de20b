"""Evaluates a model of MMDetection, MMSegmentation or MMPretrain: test.py CONFIG CHECKPOINT [ARGUMENTS].

The arguments are those of the toolbox that the config is for; `test.py CONFIG -h` lists them.
"""

import os

# Before torch is loaded: waiting threads sleep instead of spinning, which other processes would pay for.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from mmvitzoo.engine import run_toolbox_script

if __name__ == '__main__':
    run_toolbox_script('test')
