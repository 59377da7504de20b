"""Reading checkpoint files: every format and wrapper, downloads, and hostile files."""

import collections
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from evil import Evil, attacks, little_memory, nothing_executed, outcome
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import save_file

from mmvitzoo.checkpoints import CheckpointError, load, reading

WEIGHTS = {'stem.weight': torch.arange(12.0).view(3, 4), 'stem.bias': torch.ones(3, dtype=torch.float16)}
ARRAYS = {key: value.numpy() for key, value in WEIGHTS.items()}


def assert_weights(loaded):
    assert loaded.keys() == WEIGHTS.keys()
    for key, value in WEIGHTS.items():
        assert torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin'])
@pytest.mark.parametrize('zipped', [True, False])
def test_pytorch_files(tmp_path, suffix, zipped):
    path = tmp_path / f'weights{suffix}'
    content = {'model': {k: torch.nn.Parameter(v) for k, v in WEIGHTS.items()}, 'epoch': 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_weights(load(path))


def test_safetensors_file(tmp_path):
    save_file(WEIGHTS, tmp_path / 'weights.safetensors')
    assert_weights(load(str(tmp_path / 'weights.safetensors')))


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('module', ['numpy.core', 'numpy._core'])
def test_detectron2_pickle(tmp_path, protocol, module):
    content = dict(model=collections.OrderedDict(ARRAYS), __author__='Detectron2', matching_heuristics=True)
    data = pickle.dumps(content, protocol=protocol)
    ours = np.array(0).__reduce__()[0].__module__.rsplit('.', 1)[0].encode()
    if protocol < 4:  # names are lines of text; frames of protocol 4 count their bytes
        data = data.replace(ours + b'.multiarray', module.encode() + b'.multiarray')
    (tmp_path / 'model.pkl').write_bytes(data)
    assert_weights(load(tmp_path / 'model.pkl'))


def test_python2_pickle(tmp_path):
    """The keys in Caffe2's pickles are byte strings."""
    data = pickle.dumps({'blobs': 1}, protocol=2)
    assert b'X\x05\x00\x00\x00blobs' in data
    array = pickle.dumps(np.arange(3.0), protocol=2)[2:-1]
    (tmp_path / 'model.pkl').write_bytes(b'\x80\x02}U\x04biasq\x00' + array + b's.')
    assert load(tmp_path / 'model.pkl')['bias'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('wrapper', ['state_dict', 'model', 'model_state', 'model_ema', 'state_dict_ema'])
def test_wrapped_weights(tmp_path, wrapper):
    weights = {f'module.{key}': value for key, value in WEIGHTS.items()}
    torch.save({wrapper: weights, 'optimizer': {'lr': 0.1}, 'epoch': 3}, tmp_path / 'a.pth')
    assert_weights(load(tmp_path / 'a.pth'))


def test_nested_wrappers_and_weights_before_their_average(tmp_path):
    content = {'model': {'state_dict': WEIGHTS}, 'model_ema': {'x': torch.zeros(1)}}
    torch.save(content, tmp_path / 'a.pth')
    assert_weights(load(tmp_path / 'a.pth'))


def test_key_chooses_an_entry_or_a_prefix(tmp_path):
    average = {'module.ema': torch.ones(1)}
    content = dict(model={'student.a': torch.zeros(1), 'teacher.a': torch.ones(1)}, model_ema=dict(state_dict=average))
    torch.save(content, tmp_path / 'a.pth')
    assert set(load(tmp_path / 'a.pth', 'model_ema')) == {'ema'}
    assert load(tmp_path / 'a.pth', 'teacher') == {'a': torch.ones(1)}
    with pytest.raises(CheckpointError, match="a.pth: has neither an entry 'other' nor keys that start with it, but"):
        load(tmp_path / 'a.pth', 'other')


@pytest.mark.parametrize('name', ['_orig_mod.module', 'module._orig_mod', 'model', 'model._orig_mod'])
def test_names_of_wrappers_are_removed(tmp_path, name):
    torch.save({'state_dict': {f'{name}.{key}': value for key, value in WEIGHTS.items()}}, tmp_path / 'a.ckpt')
    assert_weights(load(tmp_path / 'a.ckpt'))


class Hyperparameters(dict):
    """Stands for a class that is not installed where the file is read."""


def test_objects_beside_the_weights_of_lightning(tmp_path):
    """They are passed over and never executed; in other files they are refused."""
    content = {
        'state_dict': {f'model.{key}': value for key, value in WEIGHTS.items()},
        'hyper_parameters': Hyperparameters(path=Path('a'), evil=attacks(tmp_path / 'evil')['os.system']),
        'callbacks': {'Checkpoint': [Hyperparameters(), attacks(tmp_path / 'evil')['exec']]},
    }
    torch.save({**content, 'pytorch-lightning_version': '2.1.0'}, tmp_path / 'a.ckpt')
    with nothing_executed():
        assert_weights(load(tmp_path / 'a.ckpt'))
    torch.save(content, tmp_path / 'b.ckpt')
    with nothing_executed(), pytest.raises(CheckpointError, match='b.ckpt: .*refused to execute'):
        load(tmp_path / 'b.ckpt')
    assert not (tmp_path / 'evil').exists()


def test_weights_made_by_an_unknown_function_are_no_weights(tmp_path):
    evil = attacks(tmp_path / 'evil')['os.system']
    torch.save({'state_dict': {'a': torch.ones(1), 'b': evil}, 'pytorch-lightning_version': '2'}, tmp_path / 'a.ckpt')
    assert set(load(tmp_path / 'a.ckpt')) == {'a'} and not (tmp_path / 'evil').exists()


@pytest.mark.parametrize('write', [np.savez, np.savez_compressed])
def test_numpy_archive(tmp_path, write):
    arrays = {**ARRAYS, 'a/b': np.arange(6).reshape(2, 3).T, 'scalar': np.float64(2), 'big': np.ones(3, '>f4')}
    write(tmp_path / 'a.npz', **arrays)
    loaded = load(tmp_path / 'a.npz')
    assert loaded.keys() == arrays.keys()
    assert all(np.array_equal(value.numpy(), arrays[key]) for key, value in loaded.items())


def npz(path, array, **claims):
    """Writes an array, with claims about it in its header."""
    header = dict(np.lib.format.header_data_from_array_1_0(array), **claims)
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, header)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.npy', data.getvalue() + array.tobytes())


def test_hostile_numpy_archives(tmp_path):
    """Pickles in arrays, and arrays that claim more than the file has."""
    path = tmp_path / 'a.npz'
    np.savez(path, a=np.array([attacks(tmp_path / 'evil')['os.system']], dtype=object))
    assert outcome(path) is None and not (tmp_path / 'evil').exists()
    npz(path, np.ones(3), shape=(10**12,))
    with little_memory():
        assert outcome(path) is None
    npz(path, np.zeros(2**24, np.uint8))
    with pytest.raises(CheckpointError, match='a.npz: .*it claims more data than the file has'):
        load(path)


def test_only_a_common_module_prefix_is_removed(tmp_path):
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
    for _ in range(2):  # a page downloaded by mistake is deleted
        with pytest.raises(CheckpointError, match='^https://example.org/other/weights.pth: is neither'):
            load('https://example.org/other/weights.pth')
    assert len(calls) == 3


def test_mmengine_reads_an_address_without_executing_code(tmp_path, monkeypatch):
    target = tmp_path / 'executed'
    content = dict(state_dict=WEIGHTS, meta=dict(epoch=3))

    def download(url, file):
        torch.save(dict(content, extra=Evil(os.system, f'touch {target}')) if 'hostile' in url else content, file)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    loaded = CheckpointLoader.load_checkpoint('https://example.org/a.pth')
    assert_weights(loaded['state_dict'])
    assert loaded['meta'] == dict(epoch=3)
    with pytest.raises(CheckpointError, match='system'):
        CheckpointLoader.load_checkpoint('https://example.org/hostile.pth')
    assert not target.exists()


def test_failed_download(tmp_path, monkeypatch):
    def refuse(url, target):
        raise URLError('no route to host')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match='https://example.org/a.pth: cannot be downloaded: .*no route to host'):
        load('https://example.org/a.pth')


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Sets the rank of this process in a node of two, and what the other process does before the barrier opens."""
    events = []

    def download(url, target):
        events.append('download')
        torch.save(WEIGHTS, target)

    def start(rank, at_barrier=lambda: None):
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        monkeypatch.setattr(reading, 'barrier', lambda: (events.append('barrier'), at_barrier()))
        return events

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(reading, 'is_distributed', lambda: True)
    return start


URL = 'https://example.org/a.pth'


def test_first_process_of_a_node_downloads(node):
    events = node(rank=0)
    reading.download_once_per_node(URL)
    assert_weights(load(URL))
    assert events == ['download', 'barrier']


def test_other_processes_of_a_node_wait_for_the_download(node):
    events = node(rank=1, at_barrier=lambda: reading.download(URL))  # the first process's work
    reading.download_once_per_node(URL)
    assert_weights(load(URL))
    assert events == ['barrier', 'download']


def test_failed_download_ends_every_process_of_a_node(node, monkeypatch):
    def refuse(url, target):
        raise URLError('no route to host')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    for rank, message in ((0, 'cannot be downloaded: .*no route'), (1, 'first process of this node could not')):
        events = node(rank)
        events.clear()
        with pytest.raises(CheckpointError, match=f'{URL}: .*{message}'):
            reading.download_once_per_node(URL)
        assert events == ['barrier']  # nobody waits for ever


def test_missing_file():
    with pytest.raises(FileNotFoundError, match='nowhere.pth: no such checkpoint file'):
        load('nowhere.pth')


@pytest.mark.parametrize('attack', attacks('x'))
@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
def test_malicious_file_executes_nothing(tmp_path, attack, form):
    target, path = tmp_path / 'executed', tmp_path / 'evil.pth'
    content = {'model': {'w': attacks(target)[attack]}}
    if form == 'pickle':
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    with pytest.raises(CheckpointError, match='evil.pth: cannot be read as a checkpoint: refused to execute') as error:
        load(path)
    assert isinstance(error.value.__cause__, pickle.UnpicklingError) and not target.exists()


def test_pickled_array_cannot_claim_memory(tmp_path):
    """An array starts empty and is filled from the data of the file."""
    huge = Evil(np.array(0).__reduce__()[0], np.ndarray, (10**12,), b'b')
    (tmp_path / 'huge.pkl').write_bytes(pickle.dumps({'w': huge}))
    (tmp_path / 'call.pkl').write_bytes(pickle.dumps({'w': Evil(np.ndarray, (10**12,))}))
    for name in ('huge.pkl', 'call.pkl'):
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)


def test_torchscript_is_refused(tmp_path):
    """TorchScript archives contain code."""
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / 'program.pth')
    with pytest.raises(CheckpointError, match='program.pth: .* refused a TorchScript program'):
        load(tmp_path / 'program.pth')


@pytest.mark.parametrize('name', ['endless.pkl', 'endless.pth'])
def test_wrapper_that_contains_itself(tmp_path, name):
    content = {}
    content['model'] = content
    if name.endswith('pth'):
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=f'{name}: nests model without end'):
        load(tmp_path / name)


def test_old_tar_archives_are_refused(tmp_path):
    """PyTorch before 0.1.10 wrote such archives."""
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
def test_files_of_other_kinds(tmp_path, content, message):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f'weights.pth.*{message}'):
        load(path)


def test_zip_archive_of_other_files(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with pytest.raises(CheckpointError, match='a.pth: cannot be read'):
        load(tmp_path / 'a.pth')
