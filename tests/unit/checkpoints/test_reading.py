"""Reading files: every format, every wrapper, and nothing executed."""

import collections
import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from evil import Evil, attacks
from safetensors.torch import save_file

from mmvitzoo.checkpoints import CheckpointError, load

WEIGHTS = {'stem.weight': torch.arange(12.0).view(3, 4), 'stem.bias': torch.ones(3, dtype=torch.float16)}
ARRAYS = {key: value.numpy() for key, value in WEIGHTS.items()}


def assert_weights(loaded):
    assert loaded.keys() == WEIGHTS.keys()
    for key, value in WEIGHTS.items():
        assert torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin'])
@pytest.mark.parametrize('zipped', [True, False])
def test_torch(tmp_path, suffix, zipped):
    path = tmp_path / f'weights{suffix}'
    content = {'model': {k: torch.nn.Parameter(v) for k, v in WEIGHTS.items()}, 'epoch': 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_weights(load(path))


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / 'weights.safetensors')
    assert_weights(load(str(tmp_path / 'weights.safetensors')))


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('module', ['numpy.core', 'numpy._core'])
def test_detectron2_pickle(tmp_path, protocol, module):
    content = dict(model=collections.OrderedDict(ARRAYS), __author__='Detectron2', matching_heuristics=True)
    data = pickle.dumps(content, protocol=protocol)
    ours = np.array(0).__reduce__()[0].__module__.rsplit('.', 1)[0].encode()
    if protocol < 4:  # there names stand as lines; frames of protocol 4 count their bytes
        data = data.replace(ours + b'.multiarray', module.encode() + b'.multiarray')
    (tmp_path / 'model.pkl').write_bytes(data)
    assert_weights(load(tmp_path / 'model.pkl'))


def test_python2_pickle(tmp_path):
    """Caffe2's pickles were written by Python 2: keys are byte strings."""
    data = pickle.dumps({'blobs': 1}, protocol=2)
    assert b'X\x05\x00\x00\x00blobs' in data
    array = pickle.dumps(np.arange(3.0), protocol=2)[2:-1]
    (tmp_path / 'model.pkl').write_bytes(b'\x80\x02}U\x04biasq\x00' + array + b's.')
    assert load(tmp_path / 'model.pkl')['bias'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('wrapper', ['state_dict', 'model', 'model_state', 'model_ema', 'state_dict_ema'])
def test_wrappers(tmp_path, wrapper):
    weights = {f'module.{key}': value for key, value in WEIGHTS.items()}
    torch.save({wrapper: weights, 'optimizer': {'lr': 0.1}, 'epoch': 3}, tmp_path / 'a.pth')
    assert_weights(load(tmp_path / 'a.pth'))


def test_wrappers_nest_and_plain_weights_come_before_averaged(tmp_path):
    content = {'model': {'state_dict': WEIGHTS}, 'model_ema': {'x': torch.zeros(1)}}
    torch.save(content, tmp_path / 'a.pth')
    assert_weights(load(tmp_path / 'a.pth'))


def test_only_a_common_module_prefix_is_taken_off(tmp_path):
    torch.save({'module.a': torch.zeros(1), 'b': torch.zeros(1)}, tmp_path / 'a.pth')
    assert set(load(tmp_path / 'a.pth')) == {'module.a', 'b'}


def test_url_is_downloaded_once(tmp_path, monkeypatch):
    calls = []

    def download(url, target):
        calls.append(url)
        if 'other' in url:
            Path(target).write_text('<html>')
        else:
            torch.save(WEIGHTS, target)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    for _ in range(2):
        assert_weights(load('https://example.org/files/weights.pth?dl=1'))
    assert calls == ['https://example.org/files/weights.pth?dl=1']
    for _ in range(2):  # a page saved by mistake is not kept
        with pytest.raises(CheckpointError, match='^https://example.org/other/weights.pth: is neither'):
            load('https://example.org/other/weights.pth')
    assert len(calls) == 3


def test_failed_download(tmp_path, monkeypatch):
    def refuse(url, target):
        raise URLError('no route to host')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match='https://example.org/a.pth: cannot be downloaded: .*no route to host'):
        load('https://example.org/a.pth')


def test_missing_file():
    with pytest.raises(FileNotFoundError, match='nowhere.pth: no such checkpoint file'):
        load('nowhere.pth')


@pytest.mark.parametrize('attack', attacks('x'))
@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
def test_malicious(tmp_path, attack, form):
    target, path = tmp_path / 'executed', tmp_path / 'evil.pth'
    content = {'model': {'w': attacks(target)[attack]}}
    if form == 'pickle':
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    with pytest.raises(CheckpointError, match='evil.pth: cannot be read as a checkpoint: refused to execute') as error:
        load(path)
    assert isinstance(error.value.__cause__, pickle.UnpicklingError) and not target.exists()


def test_pickle_cannot_claim_memory(tmp_path):
    """An array is made empty and filled from the data that is there."""
    huge = Evil(np.array(0).__reduce__()[0], np.ndarray, (10**12,), b'b')
    (tmp_path / 'huge.pkl').write_bytes(pickle.dumps({'w': huge}))
    (tmp_path / 'call.pkl').write_bytes(pickle.dumps({'w': Evil(np.ndarray, (10**12,))}))
    for name in ('huge.pkl', 'call.pkl'):
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)


def test_torch_program_is_not_run(tmp_path):
    """TorchScript archives bring code."""
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / 'program.pth')
    with pytest.raises(CheckpointError, match='program.pth: is a TorchScript program'):
        load(tmp_path / 'program.pth')


@pytest.mark.parametrize('name', ['endless.pkl', 'endless.pth'])
def test_endless_nesting(tmp_path, name):
    content = {}
    content['model'] = content
    if name.endswith('pth'):
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=f'{name}: nests model without end'):
        load(tmp_path / name)


def test_old_tar_archives_are_refused(tmp_path):
    """What PyTorch wrote before 0.1.10."""
    with tarfile.open(tmp_path / 'old.pth', 'w') as archive:
        archive.addfile(tarfile.TarInfo('storages'), io.BytesIO())
    with pytest.raises(CheckpointError, match='old.pth: is neither a PyTorch'):
        load(tmp_path / 'old.pth')


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'is neither'),
        (b'<html>404 Not Found</html>', "starts with b'<html>404 Not Fo'"),
        (b'\x89PNG\r\n\x1a\n' + bytes(100), 'is neither'),
        (b'version https://git-lfs.github.com/spec/v1', 'is neither'),
        (pickle.dumps([1, 2]), 'holds no weights, but list'),
        (pickle.dumps({'epoch': 3, 'lr': 0.1}), r"holds no weights, but \['epoch', 'lr'\]"),
    ],
)
def test_foreign_files(tmp_path, content, message):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f'weights.pth.*{message}'):
        load(path)


def test_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with pytest.raises(CheckpointError, match='a.pth: cannot be read'):
        load(tmp_path / 'a.pth')
