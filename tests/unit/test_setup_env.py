"""tools/setup_env.py: installed packages, updates, error messages, wheel cache."""

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
    """Returns a function that runs the script for an environment in ``tmp_path``."""
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage(10**12, 0, 10**11))
    monkeypatch.setattr(setup_env, 'PYTHON', sys.version_info[:2])

    def main(*options):
        monkeypatch.setattr(sys, 'argv', ['setup_env.py', '--venv', str(tmp_path / 'venv'), *options])
        setup_env.main()

    return main


@pytest.fixture
def steps(monkeypatch):
    """Records the labels of the steps instead of executing them."""
    steps = []

    def make_environment(venv, stack, ops, log):
        steps.append(f'{stack} with {ops}')
        (venv / 'lib/python3.11/site-packages').mkdir(parents=True)

    monkeypatch.setattr(setup_env, 'make_environment', make_environment)
    monkeypatch.setattr(setup_env, 'run', lambda command, label, log: steps.append(label))
    return steps


def error_message(main, *options):
    with pytest.raises(SystemExit) as error:
        main(*options)
    message = str(error.value).strip()
    assert message.startswith('setup failed: ') and '\n' not in message
    return message


def test_unsupported_python(main, monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 2))
    monkeypatch.setattr(sys, 'version', '3.9.2 (default)')
    message = error_message(main)
    assert 'the pinned versions require Python' in message and 'is 3.9.2' in message and 'make PYTHON=' in message


def test_compiler_is_required_only_for_compiled_ops(main, monkeypatch, tmp_path, steps):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    main()
    assert steps[0] == 'openmmlab with torchvision'
    assert 'no C++ compiler' in error_message(main, '--ops', 'compiled')
    monkeypatch.setattr(shutil, 'which', lambda name: '/usr/bin/c++')
    monkeypatch.setattr(setup_env.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    assert re.search('apt-get install python3.[0-9]+-dev', error_message(main, '--ops', 'compiled'))


def test_insufficient_disk_space(main, monkeypatch, tmp_path):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage(10**12, 0, 2 * 2**30))
    message = error_message(main)
    assert 'has 2.0 GiB of free disk space, but 9 GiB are required: free some space, or make VENV=' in message
    assert not (tmp_path / 'venv').exists()


@pytest.mark.parametrize(
    'printed, message',
    [
        ('Max retries exceeded with url', 'the package index does not answer; check the network'),
        ('OSError: [Errno 28] No space left on device', 'no space left on the device; free some space'),
        ('a|b|error: no such package', 'a | b | error: no such package; see '),
    ],
)
def test_failed_step_leaves_no_environment(main, monkeypatch, tmp_path, printed, message):
    lines = printed.split('|')

    def make_environment(venv, stack, ops, log):
        command = [sys.executable, '-c', f'import sys; print(*{lines!r}, sep="\\n"); sys.exit(1)']
        setup_env.run(command, 'installing', log)

    monkeypatch.setattr(setup_env, 'make_environment', make_environment)
    assert message in error_message(main)
    assert not (tmp_path / 'venv').exists() and lines[-1] in (tmp_path / 'venv-setup.log').read_text()


PROJECT = ['installing mmvitzoo', 'installing the operators', 'checking the imports']


def test_only_changes_are_installed(main, monkeypatch, tmp_path, steps):
    main('--for', 'demo')
    assert steps == ['openmmlab with torchvision', *PROJECT, 'installing demo']
    del steps[:]
    main('--for', 'demo')
    main('--for', 'env')
    assert steps == []
    # Another target installs its additional packages.
    main('--for', 'test')
    assert steps == ['installing tests', 'installing tools']
    # Changed requirements and sources are installed; another stack recreates the environment.
    (tmp_path / 'venv' / 'ready-tests').write_text('other versions')
    (tmp_path / 'venv' / 'ready-project').write_text('other sources')
    main('--for', 'test')
    assert steps[2:] == [*PROJECT, 'installing tests']
    main('--stack', 'onedl')
    assert steps[6:] == ['onedl with torchvision', *PROJECT] and not (tmp_path / 'venv' / 'ready-demo').exists()


def test_failed_update_keeps_the_environment(main, monkeypatch, tmp_path, steps):
    main()

    def make_environment(venv, stack, ops, log):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, 'make_environment', make_environment)
    with pytest.raises(KeyboardInterrupt):
        main('--stack', 'onedl')
    del steps[:]
    main()
    assert steps == [] and [path.name for path in tmp_path.glob('venv*/')] == ['venv']


def test_foreign_folder_is_not_replaced(main, tmp_path, steps):
    (tmp_path / 'venv').mkdir()
    (tmp_path / 'venv' / 'pyvenv.cfg').write_text('')
    assert 'was not created by this script' in error_message(main) and (tmp_path / 'venv' / 'pyvenv.cfg').exists()


def test_fingerprint_depends_on_the_folder(tmp_path):
    """Scripts in a copied or moved environment start the interpreter of the original environment."""
    first, second = (setup_env.fingerprint(tmp_path / name, 'openmmlab', 'torchvision') for name in 'ab')
    assert first != second


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


def test_wheel_cache_is_keyed_by_versions(tmp_path, monkeypatch, build):
    body = 'open("calls", "a").write("x")\n(folder / "mmcv-2.1.0.whl").write_text("wheel")'
    monkeypatch.setattr(setup_env, 'pip', fake_pip(tmp_path, body))
    first = build()
    assert first.parent == tmp_path / 'cache' / 'mmvitzoo' / 'openmmlab-mmcv2.1.0-torch2.11.0-py311-cpu'
    assert build() == first and Path('calls').read_text() == 'x'
    # Another torch version and operators for CUDA need their own wheels.
    assert len({first, build('2.10.0'), build(cuda=True)}) == 3 and Path('calls').read_text() == 'xxx'


def test_failed_build_leaves_no_wheel(tmp_path, monkeypatch, build):
    body = '(folder / "half.whl").write_text("")\nsys.exit("error: no such file: torch.h")'
    monkeypatch.setattr(setup_env, 'pip', fake_pip(tmp_path, body))
    with pytest.raises(SystemExit, match='setup failed: compiling mmcv==2.1.0: .*no such file: torch.h'):
        build()
    assert not list((tmp_path / 'cache').rglob('*.whl'))
