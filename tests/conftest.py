"""Shared fixtures: reference cases, a workspace with the demonstration data, runners of commands."""

import os

# Set before torch is imported. By default, oneDNN caches 1024 compiled operators: 2 GB in tests of many sizes.
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

import mmvitzoo
from mmvitzoo.checkpoints.reading import _cache_path

ROOT = Path(__file__).resolve().parents[1]
MINI_CONFIG = 'configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py'

# Several test processes share the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Marks documentation and fuzz tests by their folder and as slow."""
    for item in items:
        folder = item.path.relative_to(ROOT / 'tests').parts[0]
        if folder in ('docs', 'fuzz'):
            item.add_marker(folder)
            item.add_marker('slow')


def resident_memory():
    """Returns the memory of this process in bytes; 0 where there is no /proc."""
    with suppress(OSError):
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGESIZE')
    return 0


TRIMMED = pytest.StashKey()  # memory of this process after the last trim, in bytes


def pytest_runtest_teardown(item, nextitem):
    """Returns memory to the system after each test file, and when the process has grown by 128 MB."""
    if nextitem is None or nextitem.path != item.path or resident_memory() > item.config.stash.get(TRIMMED, 0) + 2**27:
        if 'torch._dynamo' in sys.modules:
            torch.compiler.reset()  # compiled graphs
        gc.collect()
        with suppress(OSError, AttributeError):  # the C library is not glibc
            ctypes.CDLL('libc.so.6').malloc_trim(0)
        item.config.stash[TRIMMED] = resident_memory()


_spec = importlib.util.spec_from_file_location('golden', ROOT / 'tests' / 'data' / 'golden' / 'golden.py')
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


class Golden:
    """Reference case: weights with the key names of the original code, inputs, and the original outputs."""

    def __init__(self, name):
        self.case = golden.load_case(name)
        arrays = golden.make_state_dict(self.case['keys'], self.case['salt'], self.case['aliases'])
        self.state_dict = {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}
        shapes = self.case.get('inputs', {'': self.case['input_shape']})
        self.inputs = {
            name: torch.from_numpy(golden.make_input(shape, self.case['salt'])) for name, shape in shapes.items()
        }
        self.input = next(iter(self.inputs.values()))

    def error(self, name, tensor):
        """Returns the relative error of an output."""
        return golden.relative_error(tensor.contiguous().numpy(), self.case['outputs'][name])


@pytest.fixture(scope='session')
def load_golden():
    """Returns a function that loads a reference case by name. It caches the last case unless that is large."""
    cache = {}

    def load(name):
        if name in cache:
            return cache[name]
        cache.clear()
        case = Golden(name)
        if sum(value.nbytes for value in case.state_dict.values()) < 2**27:  # the largest has 0.9 GB
            cache[name] = case
        return case

    return load


@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    """Creates a folder with the layout of the repository and the demonstration data."""
    folder = tmp_path_factory.mktemp('workspace')
    for name in ('configs', 'tools'):
        (folder / name).symlink_to(ROOT / name)
    build_mini_coco(folder / 'data' / 'mini')
    return folder


@pytest.fixture(scope='session')
def mock_datasets(workspace, load_golden):
    """Adds the demonstration data in the layouts of public datasets, and random weights in the authors' layouts."""
    from mmdet.datasets import CocoDataset

    (workspace / 'checkpoints').mkdir(exist_ok=True)
    deit = timm.create_model('deit_tiny_patch16_224')
    torch.save({'model': deit.state_dict()}, workspace / 'checkpoints/deit_tiny.pth')
    os.environ['TORCH_HOME'] = str(workspace / 'torch')  # cache of downloads
    for arch in ('tiny', 'small'):
        weights = load_golden(f'mpvit_{arch}_official').state_dict
        file = workspace / f'checkpoints/mpvit_{arch}.pth'
        torch.save({'model': weights}, file)
        config = mmvitzoo.get_config(f'retinanet_mpvit-{arch}_fpn_1x_coco')
        cached = Path(_cache_path(config.model.backbone.init_cfg.checkpoint))
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.symlink_to(file)
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
def clean_mock_datasets(mock_datasets):
    """Removes output files of other documentation pages, which the tools refuse to overwrite."""
    for path in (mock_datasets / 'my_config.py', *mock_datasets.glob('checkpoints/*_*_*.pth')):
        path.unlink(missing_ok=True)
    return mock_datasets


@pytest.fixture(scope='session')
def run(workspace):
    """Returns a function that runs a command line in the workspace, checks its exit code and returns its output."""

    def run(command, fails=False, **env):
        # As in an activated environment, commands are searched beside this Python interpreter.
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
    """Returns a function that runs a Python tool like `run`, but in this process, to save the time of imports."""

    def run_tool(command, fails=False):
        monkeypatch.chdir(workspace)
        monkeypatch.setattr(sys, 'argv', shlex.split(command))
        monkeypatch.setattr(logging, 'raiseExceptions', False)  # loggers may hold a closed stream of an earlier test
        capsys.readouterr()
        code = None
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        output = captured.out + captured.err + (f'{code}\n' if isinstance(code, str) else '')
        assert bool(code) == fails, output[-4000:]
        return output

    return run_tool
