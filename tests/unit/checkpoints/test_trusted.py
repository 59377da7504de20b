"""MMEngine's own checkpoints load on torch >= 2.6, and nothing else does that should not."""

import os
import pickle

import numpy as np
import pytest
import torch
from evil import attacks
from mmengine.logging import HistoryBuffer, MessageHub

from mmvitzoo.checkpoints import load
from mmvitzoo.checkpoints.trusted import empty_array, history_method, trusted_names


@pytest.fixture
def runner_checkpoint(tmp_path):
    """What MMEngine's Runner stores beside the weights."""
    hub = MessageHub.get_instance('trusted-test')
    for value in (1.5, np.float32(2.5), np.float64(3.5)):
        hub.update_scalar('train/loss', value)
    hub.update_info('iter', np.int64(3))
    path = tmp_path / 'iter_3.pth'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': hub.state_dict(), 'meta': {'iter': 3}}, path)
    return path


@pytest.mark.stack
def test_runner_checkpoint_loads(runner_checkpoint):
    content = torch.load(runner_checkpoint, weights_only=True)
    buffer = content['message_hub']['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer) and buffer.mean() == 2.5
    assert load(runner_checkpoint)['w'].tolist() == [1, 1]


def test_runner_checkpoint_loads_on_older_torch(runner_checkpoint, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.1.2')
    assert load(runner_checkpoint)['w'].tolist() == [1, 1]


@pytest.mark.stack
@pytest.mark.parametrize('attack', attacks('x'))
def test_malicious_pickle_still_fails(tmp_path, attack):
    path, target = tmp_path / 'evil.pth', tmp_path / 'executed'
    torch.save({'state_dict': {}, 'message_hub': attacks(target)[attack]}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert not target.exists()


def test_getattr_alone_is_trusted_of_the_builtins():
    names = {name: target for name, target in trusted_names().items() if 'builtin' in name}
    assert names == {'builtins.getattr': history_method, '__builtin__.getattr': history_method}


@pytest.mark.parametrize(
    'owner, name', [(HistoryBuffer, '__init__'), (HistoryBuffer, 'update'), (os, 'min'), (np, 'max')]
)
def test_getattr_is_restricted(owner, name):
    with pytest.raises(pickle.UnpicklingError, match='refused getattr'):
        history_method(owner, name)


@pytest.mark.parametrize('kind, shape', [(np.ndarray, (10**12,)), (np.matrix, (0,))])
def test_arrays_are_empty_at_first(kind, shape):
    with pytest.raises(pickle.UnpicklingError, match='refused an array that claims'):
        empty_array(kind, shape, b'b')
