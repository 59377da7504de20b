"""The converters and the data builder leave whole files or none, however they end."""

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from itertools import product
from pathlib import Path

import cv2
import pytest
import timm
import torch

from mmvitzoo.checkpoints import load
from mmvitzoo.datasets import build_mini_coco, mini_coco

ROOT = Path(__file__).resolve().parents[2]
CONVERTER = 'model_converters/convert.py'
BUILDER = 'dataset_converters/make_mini_coco.py'
READ_ONLY = Path('/sys')  # to root, too


def run_tool(name, arguments, largest_file):
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [name, *map(str, arguments)]
    runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')


def start(name, *arguments, largest_file=None):
    """The command in a process of its own, which finds everything imported and gets to the point."""
    process = multiprocessing.get_context('fork').Process(target=run_tool, args=(name, arguments, largest_file))
    process.start()
    return process


def run(*command, **kwargs):
    process = start(*command, **kwargs)
    process.join(120)
    process.kill()
    return process.exitcode


def kill(process, moment):
    """Kills it at the moment, if it is not done before; whether it was in time."""
    deadline = time.monotonic() + 120
    while process.is_alive() and not moment():
        assert time.monotonic() < deadline
        time.sleep(1e-4)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Large enough to be met while it is written."""
    path = tmp_path_factory.mktemp('checkpoint') / 'vit.pth'
    torch.save(timm.create_model('vit_tiny_patch16_224').state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # what was killed leaves much


def length(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed since it was listed
        return 0


def equal(weights, expected):
    return weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_killed_converter(suffix, checkpoint, folder):
    """The file is the old one or the new one; what a killed process leaves is in nobody's way."""
    reference, target = folder / f'reference{suffix}', folder / 'out' / f'mm{suffix}'
    assert run(CONVERTER, checkpoint, reference) == 0
    expected, size = load(reference), reference.stat().st_size
    target.parent.mkdir()
    moments = ((None, 0), (None, 0.3), (b'old', 0.6), (b'old', 0.9))
    parts = []
    for attempt in range(40):  # a busy machine lets us miss moments
        old, share = moments[attempt % 4]
        target.unlink(missing_ok=True)
        if old:
            target.write_bytes(old)
        before = set(target.parent.iterdir())

        def is_so_far(share=share, before=before):
            return any(length(path) >= share * size for path in set(target.parent.iterdir()) - before)

        in_time = kill(start(CONVERTER, checkpoint, target, '--force'), is_so_far)
        parts += [length(path) for path in set(target.parent.iterdir()) - before - {target}]
        if target.exists() and target.read_bytes() != old:
            assert equal(load(target), expected)
        else:
            assert in_time
        if attempt >= 3 and any(part < size for part in parts):
            break
    else:
        raise AssertionError('killed too late each time')
    assert run(CONVERTER, checkpoint, target, '--force') == 0
    assert equal(load(target), expected)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(mini_coco, 'NUM_IMAGES', dict(train=40, val=20))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # threads do not survive a fork
    yield
    cv2.setNumThreads(threads)


def test_killed_build(few_images, folder):
    """The folder is whole or not there; where an old one was, it is that, the new one or not there."""
    build_mini_coco(folder / 'reference')
    expected = files(folder / 'reference')
    target = folder / 'data' / 'mini'
    target.parent.mkdir()
    moments = ('', 'new/train/000020.jpg', 'new/annotations/instances_train.json', 'new/semantic/val/000010.png')
    in_time = []
    for has_old, moment in product((False, True), (*moments, f'new/{mini_coco.MARK}')):
        allowed = [expected]
        shutil.rmtree(target, ignore_errors=True)
        if has_old:
            shutil.copytree(folder / 'reference', target)
            (target / 'old').touch()
            allowed.append(files(target))
        before = set(target.parent.iterdir())

        def is_so_far(moment=moment, before=before):
            return any((path / moment).exists() for path in set(target.parent.iterdir()) - before - {target})

        in_time.append(kill(start(BUILDER, target), is_so_far))
        assert not target.exists() or files(target) in allowed
    assert sum(in_time) >= 6  # else they were too fast for us
    left = set(target.parent.iterdir()) - {target}
    assert len(left) > 1
    assert run(BUILDER, target) == 0 and files(target) == expected
    # Work that is an hour old is nobody's; what is younger may be a build's that still runs.
    young = left.pop()
    for path in left:
        os.utime(path, (0, 0))
    foreign = target.with_name('.mini.txt')
    foreign.touch()
    os.utime(foreign, (0, 0))
    assert run(BUILDER, target) == 0 and files(target) == expected
    assert set(target.parent.iterdir()) == {target, young, foreign}


def one_line(capfd):
    """All that the command said."""
    out, error = capfd.readouterr()
    assert not out and error.count('\n') == 1 and error.endswith('\n'), error
    return error


@pytest.mark.parametrize('largest_file', [500, 8000])
def test_no_space_for_data(largest_file, few_images, monkeypatch, folder, capfd):
    """For anything; and for images alone, which OpenCV would leave out without a word."""
    monkeypatch.setattr(mini_coco, 'NUM_IMAGES', dict(train=1, val=1))
    build_mini_coco(folder / 'reference')
    sizes = [len(content) for path, content in files(folder / 'reference').items() if path.suffix == '.json']
    assert min(sizes) > 500 and max(sizes) < 8000 < (folder / 'reference/train/000001.jpg').stat().st_size
    target = folder / 'mini'
    assert run(BUILDER, target, largest_file=largest_file) == 1
    assert one_line(capfd) == f'{target}: [Errno 27] File too large\n'
    assert os.listdir(folder) == ['reference']


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('largest_file', [1000, 10**7])
def test_no_space_for_a_checkpoint(suffix, largest_file, checkpoint, folder, capfd):
    target = folder / f'mm{suffix}'
    assert run(CONVERTER, checkpoint, target, largest_file=largest_file) == 1
    assert str(target) in one_line(capfd)
    assert os.listdir(folder) == []


@pytest.mark.skipif(not READ_ONLY.is_dir(), reason='no folder in which root, too, may not write')
@pytest.mark.parametrize('name', [CONVERTER, BUILDER])
def test_read_only_folder(name, checkpoint, capfd):
    for target in (READ_ONLY / 'mmvitzoo', READ_ONLY / 'new' / 'mmvitzoo'):
        assert run(name, *([] if name == BUILDER else [checkpoint]), target) == 1
        assert f'{READ_ONLY}/' in one_line(capfd)
        assert not target.exists()
