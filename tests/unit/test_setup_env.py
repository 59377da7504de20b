"""The script behind `make demo` and `make test`: what it says when a machine lacks something."""

import importlib.util
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
    monkeypatch.setattr(sys, 'argv', ['setup_env.py', '--venv', str(tmp_path / 'venv')])
    return setup_env.main


def refused(main):
    with pytest.raises(SystemExit) as stop:
        main()
    message = str(stop.value).strip()
    assert message.startswith('set-up stopped: ') and '\n' not in message
    return message


def test_other_python(main, monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 2))
    monkeypatch.setattr(sys, 'version', '3.9.2 (default)')
    assert 'Python 3.11 is needed' in refused(main) and 'is 3.9.2' in refused(main)
    assert 'make PYTHON=' in refused(main)


def test_no_compiler(main, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert 'no C++ compiler' in refused(main) and 'apt-get install g++' in refused(main)


def test_no_headers(main, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    assert 'no Python headers' in refused(main) and 'apt-get install python3.11-dev' in refused(main)


def test_no_disk_space(main, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage(10**12, 0, 2 * 2**30))
    assert 'has 2.0 GiB of free disk, 9 are needed' in refused(main)


def test_second_call_does_nothing(main, monkeypatch, tmp_path):
    stamp = tmp_path / 'venv' / 'ready'
    stamp.parent.mkdir()
    requirements = ROOT / 'requirements' / 'openmmlab.txt'
    state = f'{stamp.parent.resolve()}\n{setup_env.fingerprint(requirements, setup_env.has_cuda())}'
    stamp.write_text(state)
    monkeypatch.setattr(setup_env, 'run', lambda *args: pytest.fail('installs something'))
    main()
    monkeypatch.setattr(setup_env, 'run', lambda *args: sys.exit('installs'))
    stamp.write_text(f'{stamp.parent.resolve()}\nother versions')
    with pytest.raises(SystemExit, match='installs'):
        main()
    assert stamp.exists()
    stamp.write_text('/where/it/was/made\n')  # copied or moved: its scripts are of no use
    with pytest.raises(SystemExit, match='installs'):
        main()
    assert not stamp.exists()


def fake_pip(tmp_path, body):
    pip = tmp_path / 'pip.py'
    pip.write_text(f'import pathlib, sys\nfolder = pathlib.Path(sys.argv[sys.argv.index("-w") + 1])\n{body}')
    return [sys.executable, pip]


def test_wheel_is_kept_by_versions(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    log = tmp_path / 'log'
    log.write_text('')
    pip = fake_pip(
        tmp_path, 'with open("calls", "a") as f: f.write("x")\n(folder / "mmcv-2.1.0.whl").write_text("wheel")'
    )
    monkeypatch.chdir(tmp_path)

    def build(torch='2.11.0', cuda=False):
        core = [f'torch==={torch}', 'numpy==2.2.6']
        return setup_env.mmcv_wheel(pip, 'mmcv==2.1.0', core, 'openmmlab', cuda, log)

    first = build()
    assert first.parent == tmp_path / 'cache' / 'mmvitzoo' / 'openmmlab-mmcv2.1.0-torch2.11.0-py311-cpu'
    assert build() == first and Path('calls').read_text() == 'x'
    # Another torch, or operators for CUDA: another wheel.
    assert len({first, build('2.10.0'), build(cuda=True)}) == 3 and Path('calls').read_text() == 'xxx'


def test_failed_build_leaves_no_wheel_and_shows_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    log = tmp_path / 'log'
    log.write_text('')
    pip = fake_pip(tmp_path, '(folder / "half.whl").write_text("")\nsys.exit("error: no such file: torch.h")')
    with pytest.raises(SystemExit, match='(?s)compiling mmcv==2.1.0 failed; the end of .*no such file: torch.h'):
        setup_env.mmcv_wheel(pip, 'mmcv==2.1.0', ['torch===2.11.0'], 'openmmlab', False, log)
    assert not list((tmp_path / 'cache').rglob('*.whl'))


def test_progress_counts_compiled_files(tmp_path):
    log = tmp_path / 'log'
    log.write_text('  [1/77] c++ a.o\n  [12/77] c++ -MMD b.o\nwarning: x[3/4]\n')
    assert setup_env.progress(log, 0) == ', file 12 of 77'
    assert setup_env.progress(log, log.stat().st_size) == ''  # of the step before
