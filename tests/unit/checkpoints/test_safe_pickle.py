"""Hostile pickles in every file format: nothing is executed and no claimed memory is allocated.

Also the closed list of names by which MMEngine resumes from its own checkpoints.
"""

import multiprocessing
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from evil import (
    CLAIMS,
    FILES,
    FORBIDDEN,
    array,
    attacks,
    call,
    little_memory,
    name,
    outcome,
    program,
    same,
    stored,
    write,
)
from mmengine.logging import HistoryBuffer, MessageHub

from mmvitzoo.checkpoints import load
from mmvitzoo.checkpoints.safe_pickle import empty_array, history_method, trusted_names


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'weights.pth'


def test_handwritten_files_are_valid(path):
    """Without the hostile parts that the other tests add, they load."""
    for form in FILES:
        tensor = array() if form == 'pickle' else stored(form)
        write(path, form, program({'model': {'w': tensor}}))
        same(outcome(path), {'w': torch.zeros(4)})


@pytest.mark.parametrize('form', FILES)
def test_unknown_names_are_refused(path, form):
    """An unknown name ends the reading, even if it is not called."""
    for forbidden in FORBIDDEN:
        for content in (name(forbidden), call(forbidden, 'w'), call('builtins.getattr', name(forbidden), 'mean')):
            write(path, form, program({'model': {'v': array(), 'w': content}}))
            assert outcome(path) is None, forbidden


def in_own_process(function, *args):
    """Runs a test in a process whose peak memory does not include that of earlier tests."""
    process = multiprocessing.get_context('fork').Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def read_claims(path, form):
    for claim, make in CLAIMS.items():
        print(claim)
        for n in (10**12, 2**63 - 1):
            with little_memory():
                write(path, form, program({'model': {'w': make(n)}}))
                outcome(path)


@pytest.mark.parametrize('form', FILES)
def test_claimed_sizes_allocate_no_memory(path, form):
    in_own_process(read_claims, path, form)


def read_compressed(path, member):
    n = 100 * 2**20
    with zipfile.ZipFile(path, 'w') as archive:
        content = {'version': b'3\n', 'data.pkl': program({'w': stored('zip', n, size=(n,))})}
        for key in content.keys() - {member}:
            archive.writestr(f'a/{key}', content[key])
        info = zipfile.ZipInfo(f'a/{member}')
        info.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(info, 'w') as file:
            for _ in range(400):
                file.write(bytes(2**20))
    with little_memory():
        assert outcome(path) is None


@pytest.mark.parametrize('member', ['data.pkl', 'byteorder', 'data/0'])
def test_compressed_archives_are_refused(path, member):
    """A few bytes would become 400 MiB."""
    in_own_process(read_compressed, path, member)


# ---------------------------------------------------------------- MMEngine's own checkpoints


@pytest.fixture
def runner_checkpoint(tmp_path):
    """A checkpoint with the objects that MMEngine's Runner stores beside the weights."""
    hub = MessageHub.get_instance('trusted-test')
    for value in (1.5, np.float32(2.5), np.float64(3.5)):
        hub.update_scalar('train/loss', value)
    hub.update_info('iter', np.int64(3))
    path = tmp_path / 'iter_3.pth'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': hub.state_dict(), 'meta': {'iter': 3}}, path)
    return path


@pytest.mark.stack
def test_torch_loads_a_runner_checkpoint(runner_checkpoint):
    content = torch.load(runner_checkpoint, weights_only=True)
    buffer = content['message_hub']['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer) and buffer.mean() == 2.5
    assert load(runner_checkpoint)['w'].tolist() == [1, 1]


def test_runner_checkpoint_loads_on_older_torch(runner_checkpoint, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.1.2')
    assert load(runner_checkpoint)['w'].tolist() == [1, 1]


@pytest.mark.stack
@pytest.mark.parametrize('attack', attacks('x'))
def test_torch_still_refuses_malicious_pickles(tmp_path, attack):
    path, target = tmp_path / 'evil.pth', tmp_path / 'executed'
    torch.save({'state_dict': {}, 'message_hub': attacks(target)[attack]}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert not target.exists()


def test_getattr_is_the_only_trusted_builtin():
    names = {name: target for name, target in trusted_names().items() if 'builtin' in name}
    assert names == {'builtins.getattr': history_method, '__builtin__.getattr': history_method}


@pytest.mark.parametrize(
    'owner, name', [(HistoryBuffer, '__init__'), (HistoryBuffer, 'update'), (os, 'min'), (np, 'max')]
)
def test_getattr_is_restricted(owner, name):
    with pytest.raises(pickle.UnpicklingError, match='refused to execute getattr'):
        history_method(owner, name)


@pytest.mark.parametrize('array_type, shape', [(np.ndarray, (10**12,)), (np.matrix, (0,))])
def test_arrays_are_rebuilt_from_empty_ones_alone(array_type, shape):
    with pytest.raises(pickle.UnpicklingError, match='refused an array'):
        empty_array(array_type, shape, b'b')
