"""What several tests share: reference cases, a workspace with the demonstration data, commands."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mmvitzoo  # noqa: F401  registers the models
from mmvitzoo.datasets import build_mini_coco

ROOT = Path(__file__).resolve().parents[1]
MINI_CONFIG = 'configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py'

# Two test processes share two cores.
torch.set_num_threads(1)

_spec = importlib.util.spec_from_file_location('golden', ROOT / 'tests' / 'data' / 'golden' / 'golden.py')
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


class Golden:
    """A reference case: weights in the original's names, an input, and what came out."""

    def __init__(self, name):
        self.case = golden.load_case(name)
        arrays = golden.make_state_dict(self.case['keys'], self.case['salt'], self.case['aliases'])
        self.state_dict = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}
        self.input = torch.from_numpy(golden.make_input(self.case['input_shape'], self.case['salt']))

    def error(self, name, tensor):
        """Relative error of an output."""
        return golden.relative_error(tensor.contiguous().numpy(), self.case['outputs'][name])


@pytest.fixture(scope='session')
def load_golden():
    cases = {}
    return lambda name: cases.setdefault(name, Golden(name))


@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    """A folder laid out like the project's root, with the demonstration data."""
    folder = tmp_path_factory.mktemp('workspace')
    for name in ('configs', 'tools'):
        (folder / name).symlink_to(ROOT / name)
    build_mini_coco(folder / 'data' / 'mini')
    return folder


@pytest.fixture(scope='session')
def run(workspace):
    """Runs a command line in the workspace; returns what it printed, fails the test if it failed."""

    def run(command, fails=False, **env):
        # Tools are found beside this Python, as in an activated environment.
        path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
        env = dict(os.environ, PATH=path, MPLBACKEND='Agg', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', **env)
        done = subprocess.run(
            command.split(), cwd=workspace, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert (done.returncode != 0) == fails, done.stdout[-4000:]
        return done.stdout

    return run
