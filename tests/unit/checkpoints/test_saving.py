"""Writing checkpoint files completely or not at all."""

import os

import pytest
import torch

from mmvitzoo.checkpoints import load, save, saving

WEIGHTS = {'a': torch.arange(6.0).view(2, 3).t(), 'b': torch.zeros(0, 4)}


@pytest.mark.parametrize('name', ['new/folder/a.pth', 'a.safetensors'])
def test_round_trip(tmp_path, name):
    save(WEIGHTS, tmp_path / name)
    loaded = load(tmp_path / name)
    assert all(torch.equal(loaded[key], value) for key, value in WEIGHTS.items())
    assert os.stat(tmp_path / name).st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_existing_file_is_kept(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_text('precious')
    with pytest.raises(FileExistsError, match='a.pth: exists already'):
        save(WEIGHTS, path)
    assert path.read_text() == 'precious'
    save(WEIGHTS, path, overwrite=True)
    assert load(path).keys() == WEIGHTS.keys()


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_failed_write_leaves_no_partial_file(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text('precious')

    def fail(content, path, *args):
        with open(path, 'w') as file:
            file.write('half')
        raise OSError('disk full')

    monkeypatch.setattr(saving.torch, 'save', fail)
    monkeypatch.setattr(saving, 'save_file', fail)
    with pytest.raises(OSError, match='disk full'):
        save(WEIGHTS, tmp_path / name, overwrite=True)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == 'precious'
