"""The script that makes environments: what it installs when, and what it says when something is missing."""

import importlib.util
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools' / 'setup_env.py')
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Calls the script for an environment in ``tmp_path``."""
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage(10**12, 0, 10**11))
    monkeypatch.setattr(setup_env, 'PYTHON', sys.version_info[:2])

    def main(*options):
        monkeypatch.setattr(sys, 'argv', ['setup_env.py', '--venv', str(tmp_path / 'venv'), *options])
        setup_env.main()

    return main


@pytest.fixture
def labels(monkeypatch):
    """The steps that were taken; none is carried out."""
    labels = []

    def make_environment(venv, stack, ops, log):
        labels.append(f'{stack} with {ops}')
        (venv / 'lib/python3.11/site-packages').mkdir(parents=True)

    monkeypatch.setattr(setup_env, 'make_environment', make_environment)
    monkeypatch.setattr(setup_env, 'run', lambda command, label, log: labels.append(label))
    return labels


def refused(main, *options):
    with pytest.raises(SystemExit) as stop:
        main(*options)
    message = str(stop.value).strip()
    assert message.startswith('set-up stopped: ') and '\n' not in message
    return message


def test_other_python(main, monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 2))
    monkeypatch.setattr(sys, 'version', '3.9.2 (default)')
    message = refused(main)
    assert 'is needed for the pinned versions' in message and 'is 3.9.2' in message and 'make PYTHON=' in message


def test_compiler_is_needed_only_to_compile(main, monkeypatch, tmp_path, labels):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    main()
    assert labels[0] == 'openmmlab with torchvision'
    assert 'no C++ compiler' in refused(main, '--ops', 'compiled')
    monkeypatch.setattr(shutil, 'which', lambda name: '/usr/bin/c++')
    monkeypatch.setattr(setup_env.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    assert re.search('apt-get install python3.[0-9]+-dev', refused(main, '--ops', 'compiled'))


def test_no_disk_space(main, monkeypatch, tmp_path):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage(10**12, 0, 2 * 2**30))
    assert 'has 2.0 GiB of free disk, 9 are needed: make room, or make VENV=' in refused(main)
    assert not (tmp_path / 'venv').exists()


@pytest.mark.parametrize(
    'printed, message',
    [
        ('Max retries exceeded with url', 'the package index does not answer; check the network'),
        ('OSError: [Errno 28] No space left on device', 'no space left on the device: make room'),
        ('a|b|error: no such package', 'a | b | error: no such package; see '),
    ],
)
def test_failed_step_leaves_no_environment(main, monkeypatch, tmp_path, printed, message):
    lines = printed.split('|')

    def make_environment(venv, stack, ops, log):
        command = [sys.executable, '-c', f'import sys; print(*{lines!r}, sep="\\n"); sys.exit(1)']
        setup_env.run(command, 'installing', log)

    monkeypatch.setattr(setup_env, 'make_environment', make_environment)
    assert message in refused(main)
    assert not (tmp_path / 'venv').exists() and lines[-1] in (tmp_path / 'venv-setup.log').read_text()


PROJECT = ['installing mmvitzoo', 'installing the operators', 'checking']


def test_second_call_does_nothing(main, monkeypatch, tmp_path, labels):
    main('--for', 'demo')
    assert labels == ['openmmlab with torchvision', *PROJECT, 'installing demo']
    del labels[:]
    main('--for', 'demo')
    main('--for', 'env')
    assert labels == []
    # Another target adds what it needs.
    main('--for', 'test')
    assert labels == ['installing tests']
    # Changed requirements or sources are installed; another stack needs another environment.
    (tmp_path / 'venv' / 'ready-tests').write_text('other versions')
    (tmp_path / 'venv' / 'ready-project').write_text('other sources')
    main('--for', 'test')
    assert labels[1:] == [*PROJECT, 'installing tests']
    main('--stack', 'onedl')
    assert labels[5:] == ['onedl with torchvision', *PROJECT] and not (tmp_path / 'venv' / 'ready-demo').exists()


def test_failed_update_keeps_the_environment(main, monkeypatch, tmp_path, labels):
    main()

    def make_environment(venv, stack, ops, log):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, 'make_environment', make_environment)
    with pytest.raises(KeyboardInterrupt):
        main('--stack', 'onedl')
    del labels[:]
    main()
    assert labels == [] and [path.name for path in tmp_path.glob('venv*/')] == ['venv']


def test_folder_of_someone_else_is_not_replaced(main, tmp_path, labels):
    (tmp_path / 'venv').mkdir()
    (tmp_path / 'venv' / 'pyvenv.cfg').write_text('')
    assert 'was not made by this script' in refused(main) and (tmp_path / 'venv' / 'pyvenv.cfg').exists()


def test_fingerprint_names_the_folder(tmp_path):
    """The scripts of an environment that was copied or moved start the interpreter of the original."""
    here, there = (setup_env.fingerprint(tmp_path / name, 'openmmlab', 'torchvision') for name in 'ab')
    assert here != there


def fake_pip(tmp_path, body):
    pip = tmp_path / 'pip.py'
    pip.write_text(f'import pathlib, sys\nfolder = pathlib.Path(sys.argv[sys.argv.index("-w") + 1])\n{body}')
    return lambda venv: [sys.executable, pip]


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)

    def build(torch='2.11.0', cuda=False):
        monkeypatch.setattr(setup_env, 'has_cuda', lambda ops: cuda)
        venv, log = tmp_path / 'venv', tmp_path / 'log'
        return setup_env.compiled_mmcv(venv, 'mmcv==2.1.0', f'torch==={torch}', 'openmmlab', log)

    return build


def test_wheel_is_kept_by_versions(tmp_path, monkeypatch, build):
    body = 'open("calls", "a").write("x")\n(folder / "mmcv-2.1.0.whl").write_text("wheel")'
    monkeypatch.setattr(setup_env, 'pip', fake_pip(tmp_path, body))
    first = build()
    assert first.parent == tmp_path / 'cache' / 'mmvitzoo' / 'openmmlab-mmcv2.1.0-torch2.11.0-py311-cpu'
    assert build() == first and Path('calls').read_text() == 'x'
    # Another torch, or operators for CUDA: another wheel.
    assert len({first, build('2.10.0'), build(cuda=True)}) == 3 and Path('calls').read_text() == 'xxx'


def test_failed_build_leaves_no_wheel(tmp_path, monkeypatch, build):
    body = '(folder / "half.whl").write_text("")\nsys.exit("error: no such file: torch.h")'
    monkeypatch.setattr(setup_env, 'pip', fake_pip(tmp_path, body))
    with pytest.raises(SystemExit, match='compiling mmcv==2.1.0 failed: .*no such file: torch.h'):
        build()
    assert not list((tmp_path / 'cache').rglob('*.whl'))
