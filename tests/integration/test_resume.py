"""Resumed trainings equal uninterrupted ones, and no checkpoint is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from forms import free_port
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

CLASSIFIER = """
_base_ = 'configs/vit/plainvit-mini_mini-classes.py'
custom_hooks = [dict(type='ExactResumeHook')]
train_dataloader = dict(batch_size=4, dataset=dict(indices=16))
val_dataloader = val_evaluator = val_cfg = None
model = dict(backbone=dict(drop_path_rate=0.2))
train_cfg = dict(max_epochs=3)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=7)
"""
DETECTOR = """
_base_ = 'configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py'
custom_hooks = [dict(type='ExactResumeHook')]
train_dataloader = dict(batch_size=2, dataset=dict(indices=8))
val_dataloader = val_evaluator = val_cfg = None
model = dict(backbone=dict(drop_path_rate=0.2))
train_cfg = dict(max_epochs=3, val_interval=10)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=7)
"""
ITERATIONS, EPOCH = 12, 4


class Record(Hook):
    """Hook that records the loss and the learning rate of each iteration.

    Args:
        stop_after: Number of iterations after which the training is interrupted. None: no interruption.
    """

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.curve = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.curve[runner.iter] = outputs['loss'].item(), runner.optim_wrapper.get_lr()['lr'][0]
        if runner.iter + 1 == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def build(workspace, monkeypatch):
    """Returns a function that builds the runner of a classifier with a given work directory."""
    monkeypatch.chdir(workspace)
    (workspace / 'resume_classifier.py').write_text(CLASSIFIER)

    def build(folder, **options):
        config = Config.fromfile('resume_classifier.py')
        config.work_dir = f'work_dirs/{folder}'
        config.experiment_name = f'{folder}_{random.random()}'  # runners of one second would share a logger
        config.merge_from_dict(options)
        return Runner.from_cfg(config)

    return build


def train(runner, stop_after=None):
    """Trains and returns the loss and the learning rate of each iteration."""
    record = Record(stop_after)
    runner.register_hook(record)
    with suppress(KeyboardInterrupt):
        runner.train()
    return record.curve


def test_resumed_training_equals_uninterrupted_one(build, workspace):
    """Augmentations, data order, drop path, schedule, weights and optimizer states are equal bit for bit."""
    expected = train(build('resume_whole'))
    assert len(expected) == ITERATIONS and len({loss for loss, _ in expected.values()}) == ITERATIONS
    stop_after = random.randint(EPOCH + 1, ITERATIONS - 1)
    before = train(build('resume_stopped'), stop_after)
    assert max(before) == stop_after - 1
    after = train(build('resume_stopped', resume=True))
    assert min(after) == (stop_after - 1) // EPOCH * EPOCH
    assert {**before, **after} == expected, f'stopped after iteration {stop_after}'
    assert_same_weights(*(workspace / f'work_dirs/resume_{name}/epoch_3.pth' for name in ('stopped', 'whole')))


def test_hook_checks_seed_and_workers(build):
    with pytest.raises(ValueError, match='ExactResumeHook requires a fixed seed'):
        build('unseeded', **{'randomness.seed': None}).train()
    by_iteration = dict(
        train_cfg=dict(_delete_=True, by_epoch=False, max_iters=1),
        train_dataloader=dict(num_workers=0, persistent_workers=False),
        param_scheduler=None,
    )
    with pytest.raises(ValueError, match='requires num_workers >= 1 in iteration-based trainings, got 0'):
        build('no_workers', **by_iteration).train()


def test_configs_keep_at_least_two_checkpoints(workspace):
    """MMEngine removes the oldest checkpoint before it writes the next one."""
    max_keep_ckpts = [
        int(number)
        for path in workspace.glob('configs/**/*.py')
        for number in re.findall(r'max_keep_ckpts=(\d+)', path.read_text())
    ]
    assert max_keep_ckpts and min(max_keep_ckpts) >= 2


@pytest.fixture
def start(workspace):
    """Returns a function that starts a command in a new process group with its output in a file."""

    def start(command, log, **env):
        path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
        env = dict(os.environ, PATH=path, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', **env)
        with open(workspace / log, 'a') as file:
            options = dict(stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            return subprocess.Popen(command.split(), cwd=workspace, env=env, **options)

    return start


def kill_groups(groups):
    """Kills process groups, since the data workers of a killed training keep running."""
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def curve(folder):
    """Reads the losses of all runs in a folder by iteration; later runs replace repeated iterations."""
    losses = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            losses[record['step']] = {key: value for key, value in record.items() if 'loss' in key or key == 'lr'}
    return losses


def assert_same_weights(path, expected):
    actual, expected = (torch.load(x, weights_only=True) for x in (path, expected))
    assert actual['state_dict'].keys() == expected['state_dict'].keys()
    for key, value in expected['state_dict'].items():
        assert torch.equal(actual['state_dict'][key], value), key
    for a, b in zip(actual['optimizer']['state'].values(), expected['optimizer']['state'].values()):
        assert torch.equal(a['exp_avg_sq'], b['exp_avg_sq'])


@pytest.mark.slow
def test_killed_detector_training_equals_uninterrupted_one(start, workspace):
    """The process is killed at a random iteration; the model samples boxes and has BatchNorm."""
    (workspace / 'resume_detector.py').write_text(DETECTOR)
    whole, folder = (workspace / 'work_dirs' / f'resume_detector_{name}' for name in ('whole', 'killed'))
    command = 'python tools/train.py resume_detector.py --work-dir'
    assert start(f'{command} {whole}', 'whole.log').wait() == 0
    expected = curve(whole)
    assert len(expected) == ITERATIONS and len({losses['loss'] for losses in expected.values()}) == ITERATIONS

    stop_after = random.randint(EPOCH + 1, ITERATIONS - 1)
    process = start(f'{command} {folder}', 'killed.log')
    while len(curve(folder)) < stop_after and process.poll() is None:
        time.sleep(0.05)
    kill_groups([process.pid])
    assert process.wait() != 0
    assert (folder / 'last_checkpoint').read_text().endswith(('epoch_1.pth', 'epoch_2.pth'))
    assert start(f'{command} {folder} --resume', 'killed.log').wait() == 0
    assert len(list(folder.glob('*/vis_data/scalars.json'))) == 2, 'the training did not resume'
    assert curve(folder) == expected, f'stopped after iteration {stop_after}'
    assert_same_weights(folder / 'epoch_3.pth', whole / 'epoch_3.pth')


@pytest.mark.slow
def test_killed_rank_stops_the_job(start, run, workspace):
    """The error message names the killed process, and the training can be resumed."""
    (workspace / 'killed.py').write_text(CLASSIFIER.replace('indices=16', 'indices=160'))
    folder = workspace / 'work_dirs' / 'killed'
    command = f'tools/dist_train.sh killed.py 2 --work-dir {folder}'
    process = start(command, 'killed_worker.log', PORT=free_port())
    while not (folder / 'last_checkpoint').exists() and process.poll() is None:
        time.sleep(0.05)
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    groups = {os.getpgid(int(pid)) for pid in [process.pid, *workers]}
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(60) != 0
    kill_groups(groups)
    message = (workspace / 'killed_worker.log').read_text()
    assert 'Signal 9 (SIGKILL) received by PID' in message and workers[-1] in message
    output = run(f'{command} --resume', PORT=free_port())
    assert re.search(r'resumed epoch: [12]', output) and (folder / 'epoch_3.pth').exists()
