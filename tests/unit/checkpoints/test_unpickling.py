"""Pickles written by hand, in every kind of file: nothing executed, and no memory that they only claim."""

import multiprocessing
import zipfile

import pytest
import torch
from evil import CLAIMS, FILES, FORBIDDEN, array, call, little_memory, name, outcome, program, same, stored, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'weights.pth'


def test_files_written_by_hand_are_right(path):
    """Without what the tests add to them, they load."""
    for form in FILES:
        tensor = array() if form == 'pickle' else stored(form)
        write(path, form, program({'model': {'w': tensor}}))
        same(outcome(path), {'w': torch.zeros(4)})


@pytest.mark.parametrize('form', FILES)
def test_forbidden_names(path, form):
    """A name that means nothing to us ends the reading, called or not."""
    for forbidden in FORBIDDEN:
        for content in (name(forbidden), call(forbidden, 'w'), call('builtins.getattr', name(forbidden), 'mean')):
            write(path, form, program({'model': {'v': array(), 'w': content}}))
            assert outcome(path) is None, forbidden


def in_own_process(function, *args):
    """Its peak of memory is not hidden by that of earlier tests."""
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
def test_claims(path, form):
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
def test_compressed_archives(path, member):
    """A few bytes would become 400 MiB."""
    in_own_process(read_compressed, path, member)
