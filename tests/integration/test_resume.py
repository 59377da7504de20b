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

MPVIT = 'configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py'
VITDET = 'configs/vitdet/mask-rcnn_plainvit-mini_mini-coco.py'
CONFIG = """
_base_ = '{config}'
custom_hooks = [dict(type='ExactResumeHook')]
train_dataloader = dict(batch_size=2, dataset=dict(indices=8))
val_dataloader = val_evaluator = val_cfg = None
model = dict(backbone=dict(drop_path_rate=0.2))
train_cfg = dict(max_epochs=3, val_interval=10)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=7)
"""
ITERATIONS, EPOCH = 12, 4
NO_WORKERS = """
_base_ = 'configs/vit/plainvit-mini_mln_upernet_mini-coco.py'
custom_hooks = [dict(type='ExactResumeHook')]
train_dataloader = dict(num_workers=0, persistent_workers=False)
randomness = dict(seed=7)
"""


@pytest.fixture
def start(workspace):
    """Starts the training of a config in a folder; its output goes to a file beside."""

    def start(config, folder, *options):
        command = [sys.executable, 'tools/train.py', config, '--work-dir', folder, *options]
        env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
        with open(workspace / f'{folder}.log', 'a') as log:
            how = dict(stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            return subprocess.Popen(command, cwd=workspace, env=env, **how)

    (workspace / 'work_dirs').mkdir(exist_ok=True)
    return start


def end(groups):
    """Ends what is left of process groups: a killed training leaves the processes that read its data."""
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def curve(folder):
    """Loss by iteration, of all runs in a folder, the last of those that did an iteration twice."""
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


@pytest.mark.parametrize('config', [MPVIT, VITDET], ids=['mpvit', 'vitdet'])
def test_stopped_training_equals_uninterrupted_one(config, start, workspace):
    """Stopped at a random iteration, once asked to and once without a warning."""
    name = f'resume_{"mpvit" if config is MPVIT else "vitdet"}'
    (workspace / f'{name}.py').write_text(CONFIG.format(config=config))
    whole = workspace / 'work_dirs' / f'{name}_whole'
    assert start(f'{name}.py', f'work_dirs/{name}_whole').wait() == 0
    expected = curve(whole)
    assert len(expected) == ITERATIONS and len({losses['loss'] for losses in expected.values()}) == ITERATIONS

    for kind in (signal.SIGTERM, signal.SIGKILL):
        folder = workspace / 'work_dirs' / f'{name}_{kind.name}'
        stop_after = random.randint(EPOCH + 1, ITERATIONS - 1)
        process = start(f'{name}.py', f'work_dirs/{folder.name}')
        while len(curve(folder)) < stop_after and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(kind)
        assert process.wait() != 0
        end([process.pid])
        assert (folder / 'last_checkpoint').read_text().endswith(('epoch_1.pth', 'epoch_2.pth'))
        assert start(f'{name}.py', f'work_dirs/{folder.name}', '--resume').wait() == 0
        assert len(list(folder.glob('*/vis_data/scalars.json'))) == 2, 'it did not resume in a second run'
        assert curve(folder) == expected, f'stopped by {kind.name} after iteration {stop_after}'
        assert_same_weights(folder / 'epoch_3.pth', whole / 'epoch_3.pth')


def test_hook_says_what_it_needs(run, workspace):
    (workspace / 'unseeded.py').write_text(CONFIG.format(config=MPVIT).replace('seed=7', 'seed=None'))
    message = run('python tools/train.py unseeded.py --work-dir work_dirs/unseeded', fails=True)
    assert 'ExactResumeHook needs a fixed seed' in message
    (workspace / 'no_workers.py').write_text(NO_WORKERS)
    message = run('python tools/train.py no_workers.py --work-dir work_dirs/no_workers', fails=True)
    assert 'a training by iterations needs num_workers of at least 1' in message


def test_a_checkpoint_is_kept_while_the_next_is_written(workspace):
    """MMEngine removes the oldest before it writes."""
    kept = [
        int(number)
        for path in workspace.glob('configs/**/*.py')
        for number in re.findall(r'max_keep_ckpts=(\d+)', path.read_text())
    ]
    assert kept and min(kept) >= 2


def test_killed_worker_stops_the_job(workspace, run):
    """With a message that names it, and a checkpoint from which both go on."""
    (workspace / 'killed.py').write_text(CONFIG.format(config=VITDET))
    folder = workspace / 'work_dirs' / 'killed'
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PORT='29531')
    env['PATH'] = f'{os.path.dirname(sys.executable)}{os.pathsep}{env["PATH"]}'
    command = ['tools/dist_train.sh', 'killed.py', '2', '--work-dir', str(folder)]
    with open(workspace / 'killed.log', 'w') as log:
        options = dict(stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        process = subprocess.Popen(command, cwd=workspace, env=env, **options)
    while not (folder / 'epoch_1.pth').exists() and process.poll() is None:
        time.sleep(0.05)
    while not (folder / 'last_checkpoint').exists() and process.poll() is None:
        time.sleep(0.05)
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    groups = {os.getpgid(int(pid)) for pid in [process.pid, *workers]}
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(60) != 0
    end(groups)
    message = (workspace / 'killed.log').read_text()
    assert 'Signal 9 (SIGKILL) received by PID' in message and workers[-1] in message
    output = run(f'tools/dist_train.sh killed.py 2 --work-dir {folder} --resume', PORT='29532')
    assert re.search(r'resumed epoch: [12]', output) and (folder / 'epoch_3.pth').exists()
