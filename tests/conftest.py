"""Shared fixtures: reference cases, a workspace with the demonstration data, commands."""

import os

# Before torch is loaded. oneDNN keeps 1024 compiled operators and their memory: 2 GB in tests of many sizes.
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '32')

import ctypes
import gc
import importlib.util
import json
import logging
import runpy
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from make_mini_coco import build_mini_coco

import mmvitzoo  # noqa: F401  registers the models

ROOT = Path(__file__).resolve().parents[1]
MINI_CONFIG = 'configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py'

# Two test processes share two cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Marks tests of the documentation and fuzz tests by their folder; both are slow."""
    for item in items:
        folder = item.path.relative_to(ROOT / 'tests').parts[0]
        if folder in ('docs', 'fuzz'):
            item.add_marker(folder)
            item.add_marker('slow')


def pytest_runtest_teardown(item, nextitem):
    """Returns freed memory to the system after each file, so that a process does not keep the most of all files."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL('libc.so.6').malloc_trim(0)


_spec = importlib.util.spec_from_file_location('golden', ROOT / 'tests' / 'data' / 'golden' / 'golden.py')
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


class Golden:
    """A reference case: weights in the original's names, an input, and what came out."""

    def __init__(self, name):
        self.case = golden.load_case(name)
        arrays = golden.make_state_dict(self.case['keys'], self.case['salt'], self.case['aliases'])
        self.state_dict = {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}
        self.input = torch.from_numpy(golden.make_input(self.case['input_shape'], self.case['salt']))

    def error(self, name, tensor):
        """Relative error of an output."""
        return golden.relative_error(tensor.contiguous().numpy(), self.case['outputs'][name])


@pytest.fixture(scope='session')
def load_golden():
    """Reference cases by name. The last one is kept if it is small; the largest has 0.9 GB."""
    kept = {}

    def load(name):
        if name in kept:
            return kept[name]
        kept.clear()
        case = Golden(name)
        if sum(value.nbytes for value in case.state_dict.values()) < 2**27:
            kept[name] = case
        return case

    return load


@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    """A folder laid out like the project's root, with the demonstration data."""
    folder = tmp_path_factory.mktemp('workspace')
    for name in ('configs', 'tools'):
        (folder / name).symlink_to(ROOT / name)
    build_mini_coco(folder / 'data' / 'mini')
    return folder


@pytest.fixture(scope='session')
def stand_ins(workspace, load_golden):
    """The demonstration data laid out like the public data sets, random weights like the authors'."""
    from mmdet.datasets import CocoDataset

    (workspace / 'checkpoints').mkdir(exist_ok=True)
    deit = timm.create_model('deit_tiny_patch16_224')
    torch.save({'model': deit.state_dict()}, workspace / 'checkpoints/deit_tiny.pth')
    for arch in ('tiny', 'small'):
        weights = load_golden(f'mpvit_{arch}_official').state_dict
        torch.save({'model': weights}, workspace / f'checkpoints/mpvit_{arch}.pth')
    data, coco, imagenet = (workspace / 'data' / name for name in ('mini', 'coco', 'imagenet'))
    ade20k = workspace / 'data' / 'ade' / 'ADEChallengeData2016'
    for folder in (coco / 'annotations', imagenet / 'meta', ade20k / 'images', ade20k / 'annotations'):
        folder.mkdir(parents=True)
    for split, name in (('train', 'training'), ('val', 'validation')):
        (coco / f'{split}2017').symlink_to(data / split)
        annotations = json.loads((data / 'annotations' / f'instances_{split}.json').read_text())
        annotations['categories'] = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)]
        (coco / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(annotations))
        (imagenet / split).symlink_to(data / 'classes' / split)
        crops = sorted((data / 'classes' / split).glob('*/*.jpg'))
        lines = [f'{path.parent.name}/{path.name} {path.parent.name}' for path in crops]
        (imagenet / 'meta' / f'{split}.txt').write_text('\n'.join(lines))
        (ade20k / 'images' / name).symlink_to(data / split)
        (ade20k / 'annotations' / name).symlink_to(data / 'semantic' / split)
    return workspace


@pytest.fixture
def clean_stand_ins(stand_ins):
    """``stand_ins`` without what the commands of another page have written, which tools refuse to overwrite."""
    for path in (stand_ins / 'my_config.py', *stand_ins.glob('checkpoints/*_*_*.pth')):
        path.unlink(missing_ok=True)
    return stand_ins


@pytest.fixture(scope='session')
def run(workspace):
    """Runs a command line in the workspace; returns what it printed, fails the test if it failed."""

    def run(command, fails=False, **env):
        # Tools are found beside this Python, as in an activated environment.
        path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
        threads = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY=os.environ.get('OMP_WAIT_POLICY', 'PASSIVE'))
        env = dict(os.environ, PATH=path, MPLBACKEND='Agg', CUDA_VISIBLE_DEVICES='', **threads, **env)
        done = subprocess.run(
            command.split(), cwd=workspace, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert (done.returncode != 0) == fails, done.stdout[-4000:]
        return done.stdout

    return run


@pytest.fixture
def run_tool(workspace, monkeypatch, capsys):
    """Runs a Python tool like `run`, but in this process, which saves the seconds that imports take."""

    def run_tool(command, fails=False):
        monkeypatch.chdir(workspace)
        monkeypatch.setattr(sys, 'argv', shlex.split(command))
        monkeypatch.setattr(logging, 'raiseExceptions', False)  # loggers may write to what an earlier test captured
        capsys.readouterr()
        code = None
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        output = printed.out + printed.err + (f'{code}\n' if isinstance(code, str) else '')
        assert bool(code) == fails, output[-4000:]
        return output

    return run_tool
