"""Converters and the dataset builder leave no incomplete files when they are killed or run out of disk space."""

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
import make_mini_coco
import pytest
import timm
import torch
from make_mini_coco import build_mini_coco

from mmvitzoo.checkpoints import load

ROOT = Path(__file__).resolve().parents[2]
CONVERTER = 'model_converters/convert.py'
BUILDER = 'dataset_converters/make_mini_coco.py'
READ_ONLY = Path('/sys')  # read-only even for root


def run_tool(name, arguments, largest_file):
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [name, *map(str, arguments)]
    if name == BUILDER:
        make_mini_coco.main()  # the imported module, whose number of images is reduced
    else:
        runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')


def start(name, *arguments, largest_file=None):
    """Starts a tool in a forked process, where all modules are imported already."""
    process = multiprocessing.get_context('fork').Process(target=run_tool, args=(name, arguments, largest_file))
    process.start()
    return process


def run(*command, **kwargs):
    process = start(*command, **kwargs)
    process.join(120)
    process.kill()
    return process.exitcode


def kill(process, condition):
    """Kills a process when a condition is met; returns False if the process ended before."""
    deadline = time.monotonic() + 120
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-4)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Saves a checkpoint that is large enough to be interrupted while it is written."""
    path = tmp_path_factory.mktemp('checkpoint') / 'vit.pth'
    torch.save(timm.create_model('vit_tiny_patch16_224').state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # killed processes leave large temporary files


def file_size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed after it was listed
        return 0


def equal(weights, expected):
    return weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_killed_converter_leaves_old_or_new_file(suffix, checkpoint, folder):
    """Temporary files of killed processes do not disturb the next call."""
    reference, target = folder / f'reference{suffix}', folder / 'out' / f'mm{suffix}'
    assert run(CONVERTER, checkpoint, reference) == 0
    expected, size = load(reference), reference.stat().st_size
    target.parent.mkdir()
    cases = ((None, 0), (None, 0.3), (b'old', 0.6), (b'old', 0.9))
    interrupted = 0
    for attempt in range(40):  # on a busy machine some kills come too late
        old, fraction = cases[attempt % 4]
        target.unlink(missing_ok=True)
        if old:
            target.write_bytes(old)
        before = set(target.parent.iterdir())

        def is_partly_written(fraction=fraction, before=before):
            return any(file_size(path) >= fraction * size for path in set(target.parent.iterdir()) - before)

        killed = kill(start(CONVERTER, checkpoint, target, '--force'), is_partly_written)
        # A temporary file is left if the kill came before it was renamed. Its size may be set before it is written.
        interrupted += killed and bool(set(target.parent.iterdir()) - before - {target})
        if target.exists() and target.read_bytes() != old:
            assert equal(load(target), expected)
        else:
            assert killed
        if attempt >= 3 and interrupted:
            break
    else:
        raise AssertionError('every kill came too late')
    assert run(CONVERTER, checkpoint, target, '--force') == 0
    assert equal(load(target), expected)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def small_dataset(monkeypatch):
    monkeypatch.setattr(make_mini_coco, 'NUM_IMAGES', dict(train=40, val=20))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # threads do not survive a fork
    yield
    cv2.setNumThreads(threads)


def test_killed_build_leaves_no_incomplete_dataset(small_dataset, folder):
    """The folder is complete or missing; an old folder is unchanged, replaced or removed."""
    build_mini_coco(folder / 'reference')
    expected = files(folder / 'reference')
    target = folder / 'data' / 'mini'
    work = target.with_name('.mini.building')
    target.parent.mkdir()
    files_to_wait_for = (
        '',
        'new/train/000020.jpg',
        'new/annotations/instances_train.json',
        'new/semantic/val/000010.png',
        f'new/{make_mini_coco.MARKER}',
    )
    killed = []
    for has_old, file in product((False, True), files_to_wait_for):
        allowed = [expected]
        for path in (target, work):
            shutil.rmtree(path, ignore_errors=True)
        if has_old:
            shutil.copytree(folder / 'reference', target)
            (target / 'old').touch()
            allowed.append(files(target))
        killed.append(kill(start(BUILDER, target), (work / file).exists))
        assert not target.exists() or files(target) in allowed
    assert sum(killed) >= 6  # otherwise too many kills came too late
    # The next build removes what a killed one has left, and nothing else.
    (work / 'new').mkdir(parents=True, exist_ok=True)
    (work / 'new' / 'rest.jpg').touch()
    foreign = target.with_name('.mini.txt')
    foreign.touch()
    assert run(BUILDER, target) == 0 and files(target) == expected
    assert set(target.parent.iterdir()) == {target, foreign}


def error_line(capfd):
    """Returns the output of a tool, which must be one line on stderr."""
    out, error = capfd.readouterr()
    assert not out and error.count('\n') == 1 and error.endswith('\n'), error
    return error


@pytest.mark.parametrize('largest_file', [500, 8000])
def test_build_without_disk_space_leaves_nothing(largest_file, small_dataset, monkeypatch, folder, capfd):
    """The limits stop all files, and images only, for which OpenCV reports no error."""
    monkeypatch.setattr(make_mini_coco, 'NUM_IMAGES', dict(train=1, val=1))
    build_mini_coco(folder / 'reference')
    sizes = [len(content) for path, content in files(folder / 'reference').items() if path.suffix == '.json']
    assert min(sizes) > 500 and max(sizes) < 8000 < (folder / 'reference/train/000001.jpg').stat().st_size
    target = folder / 'mini'
    assert run(BUILDER, target, largest_file=largest_file) == 1
    assert error_line(capfd) == f'{target}: [Errno 27] File too large\n'
    assert os.listdir(folder) == ['reference']


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('largest_file', [1000, 10**7])
def test_converter_without_disk_space_leaves_nothing(suffix, largest_file, checkpoint, folder, capfd):
    target = folder / f'mm{suffix}'
    assert run(CONVERTER, checkpoint, target, largest_file=largest_file) == 1
    assert str(target) in error_line(capfd)
    assert os.listdir(folder) == []


@pytest.mark.skipif(not READ_ONLY.is_dir(), reason='there is no folder that is read-only for root')
@pytest.mark.parametrize('name', [CONVERTER, BUILDER])
def test_read_only_folder_is_an_error(name, checkpoint, capfd):
    for target in (READ_ONLY / 'mmvitzoo', READ_ONLY / 'new' / 'mmvitzoo'):
        assert run(name, *([] if name == BUILDER else [checkpoint]), target) == 1
        assert f'{READ_ONLY}/' in error_line(capfd)
        assert not target.exists()
