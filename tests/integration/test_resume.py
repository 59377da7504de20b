"""A training that was stopped goes on as if it had not been, and loses no checkpoint."""

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
    """Keeps the loss and the learning rate of each iteration.

    Args:
        stop_after: Number of iterations after which the training is interrupted.
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
    """Builds the runner of the classifier's training in a folder."""
    monkeypatch.chdir(workspace)
    (workspace / 'resume_classifier.py').write_text(CLASSIFIER)

    def build(folder, **options):
        config = Config.fromfile('resume_classifier.py')
        config.work_dir = f'work_dirs/{folder}'
        config.experiment_name = f'{folder}_{random.random()}'  # runners of one second would share what they log
        config.merge_from_dict(options)
        return Runner.from_cfg(config)

    return build


def train(runner, stop_after=None):
    """Loss and learning rate of each iteration."""
    record = Record(stop_after)
    runner.register_hook(record)
    with suppress(KeyboardInterrupt):
        runner.train()
    return record.curve


def test_resumed_training_equals_uninterrupted_one(build, workspace):
    """Augmentations, the order of the data, drop path, schedule, weights and optimizer, bit for bit."""
    expected = train(build('resume_whole'))
    assert len(expected) == ITERATIONS and len({loss for loss, _ in expected.values()}) == ITERATIONS
    stop_after = random.randint(EPOCH + 1, ITERATIONS - 1)
    before = train(build('resume_stopped'), stop_after)
    assert max(before) == stop_after - 1
    after = train(build('resume_stopped', resume=True))
    assert min(after) == (stop_after - 1) // EPOCH * EPOCH
    assert {**before, **after} == expected, f'stopped after iteration {stop_after}'
    assert_same_weights(*(workspace / f'work_dirs/resume_{name}/epoch_3.pth' for name in ('stopped', 'whole')))


def test_hook_says_what_it_needs(build):
    with pytest.raises(ValueError, match='ExactResumeHook needs a fixed seed'):
        build('unseeded', **{'randomness.seed': None}).train()
    by_iteration = dict(
        train_cfg=dict(_delete_=True, by_epoch=False, max_iters=1),
        train_dataloader=dict(num_workers=0, persistent_workers=False),
        param_scheduler=None,
    )
    with pytest.raises(ValueError, match='a training by iterations needs num_workers of at least 1'):
        build('no_workers', **by_iteration).train()


def test_a_checkpoint_is_kept_while_the_next_is_written(workspace):
    """MMEngine removes the oldest before it writes."""
    kept = [
        int(number)
        for path in workspace.glob('configs/**/*.py')
        for number in re.findall(r'max_keep_ckpts=(\d+)', path.read_text())
    ]
    assert kept and min(kept) >= 2


@pytest.fixture
def start(workspace):
    """Starts a command in a process group of its own; its output goes to a file."""

    def start(command, log, **env):
        path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
        env = dict(os.environ, PATH=path, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', **env)
        with open(workspace / log, 'a') as file:
            how = dict(stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            return subprocess.Popen(command.split(), cwd=workspace, env=env, **how)

    return start


def end(groups):
    """Ends what is left of process groups: a killed training leaves the processes that read its data."""
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def curve(folder):
    """Losses by iteration, of all runs in a folder, the last of those that did an iteration twice."""
    losses = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            losses[record['step']] = {key: value for key, value in record.items() if 'loss' in key or key == 'lr'}
    return losses


def assert_same_weights(path, expected):
    ours, theirs = (torch.load(x, weights_only=True) for x in (path, expected))
    assert ours['state_dict'].keys() == theirs['state_dict'].keys()
    for key, value in theirs['state_dict'].items():
        assert torch.equal(ours['state_dict'][key], value), key
    for a, b in zip(ours['optimizer']['state'].values(), theirs['optimizer']['state'].values()):
        assert torch.equal(a['exp_avg_sq'], b['exp_avg_sq'])


@pytest.mark.slow
def test_killed_detector_training_equals_uninterrupted_one(start, workspace):
    """Killed without a warning at a random iteration, with sampled boxes and BatchNorm."""
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
    end([process.pid])
    assert process.wait() != 0
    assert (folder / 'last_checkpoint').read_text().endswith(('epoch_1.pth', 'epoch_2.pth'))
    assert start(f'{command} {folder} --resume', 'killed.log').wait() == 0
    assert len(list(folder.glob('*/vis_data/scalars.json'))) == 2, 'it did not resume in a second run'
    assert curve(folder) == expected, f'stopped after iteration {stop_after}'
    assert_same_weights(folder / 'epoch_3.pth', whole / 'epoch_3.pth')


@pytest.mark.slow
def test_killed_worker_stops_the_job(start, run, workspace):
    """With a message that names it, and a checkpoint from which both go on."""
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
    end(groups)
    message = (workspace / 'killed_worker.log').read_text()
    assert 'Signal 9 (SIGKILL) received by PID' in message and workers[-1] in message
    output = run(f'{command} --resume', PORT=free_port())
    assert re.search(r'resumed epoch: [12]', output) and (folder / 'epoch_3.pth').exists()
