"""Installation, update and removal of torchvision's operators in mmcv."""

import os
import subprocess
import sys
from pathlib import Path

import mmcv
import pytest

from mmvitzoo import ops
from mmvitzoo.ops import InstallError, __main__, install, remove, status

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def lite(tmp_path):
    """Creates a folder of mmcv without operators and its distribution."""
    folder = tmp_path / 'mmcv'
    folder.mkdir()
    (folder / '__init__.py').write_text("__version__ = '2.1.0'\n")
    add_distribution(tmp_path, 'mmcv-lite')
    return folder


def add_distribution(site, name):
    info = site / f'{name.replace("-", "_")}-2.1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 2.1.0\n')


def test_install_and_remove(lite):
    target = lite / '_ext.py'
    assert 'no operators' in status(lite)
    assert 'nothing to remove' in remove(lite)
    assert install(lite).endswith('version 1, installed')
    assert target.read_bytes() == ops.SOURCE.read_bytes()
    assert target.stat().st_mode == (lite / '__init__.py').stat().st_mode
    assert install(lite).endswith('already installed')
    assert status(lite).endswith("torchvision's operators, version 1")
    assert remove(lite) == f'{target}: removed'
    assert os.listdir(lite) == ['__init__.py']


def test_older_version_is_replaced(lite):
    text = ops.SOURCE.read_text().replace('version 1', 'version 0.9', 1)
    (lite / '_ext.py').write_text(text)
    assert status(lite).endswith('version 0.9')
    assert install(lite).endswith('version 1, installed in place of version 0.9')
    assert (lite / '_ext.py').read_bytes() == ops.SOURCE.read_bytes()


@pytest.mark.parametrize('name', ('_ext.cpython-311-x86_64-linux-gnu.so', '_ext.cp311-win_amd64.pyd'))
def test_compiled_mmcv_is_not_changed(lite, name):
    (lite / name).touch()
    assert status(lite).endswith(f'compiled operators ({name})')
    with pytest.raises(InstallError, match='has compiled operators'):
        install(lite)
    assert not (lite / '_ext.py').exists()


def test_file_beside_compiled_operators_can_be_removed(lite):
    install(lite)
    (lite / '_ext.so').touch()
    assert 'compiled' in status(lite)
    assert 'removed' in remove(lite)


@pytest.mark.parametrize('command', (install, remove, status))
def test_foreign_file_is_not_changed(lite, command):
    (lite / '_ext.py').write_text('nms = None\n')
    with pytest.raises(InstallError, match='was not written by mmvitzoo.ops and is left unchanged'):
        command(lite)
    assert (lite / '_ext.py').read_text() == 'nms = None\n'


def test_unreadable_file_is_an_error(lite):
    (lite / '_ext.py').mkdir()
    with pytest.raises(InstallError, match=r'^cannot read \S+_ext\.py: '):
        install(lite)


def test_two_distributions_are_an_error(lite):
    add_distribution(lite.parent, 'mmcv')
    for command in (install, status):
        with pytest.raises(
            InstallError, match='^mmcv and mmcv-lite overwrite each other: pip uninstall mmcv mmcv-lite'
        ):
            command(lite)
    assert not (lite / '_ext.py').exists()


def test_read_only_folder_is_not_changed(lite, monkeypatch):
    """Neither the old file is removed nor an incomplete file is left."""

    def fail(*args):
        raise PermissionError(13, 'Permission denied')

    install(lite)
    monkeypatch.setattr(Path, 'unlink', fail)
    with pytest.raises(InstallError, match=r'^cannot remove \S+_ext\.py: Permission denied$'):
        remove(lite)
    monkeypatch.undo()
    remove(lite)
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(InstallError, match=r'^cannot write \S+_ext\.py: Permission denied$'):
        install(lite)
    assert os.listdir(lite) == ['__init__.py']


@pytest.mark.stack
def test_install_in_mmcv_of_the_onedl_stack(lite):
    (lite.parent / 'mmcv_lite-2.1.0.dist-info').rename(lite.parent / 'other')
    add_distribution(lite.parent, 'onedl-mmcv')
    assert install(lite).endswith('installed')


def test_missing_mmcv_is_an_error(monkeypatch, tmp_path):
    """An empty folder that pip uninstall left does not count as mmcv."""
    for name in [name for name in sys.modules if name.split('.')[0] == 'mmcv']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    for _ in range(2):
        with pytest.raises(InstallError, match='^mmcv is not installed: pip install mmcv-lite'):
            install()
        (tmp_path / 'mmcv').mkdir(exist_ok=True)


def test_command_line(lite, monkeypatch, capsys):
    monkeypatch.setattr(ops, '_find_mmcv', lambda: lite)
    monkeypatch.setattr(sys, 'argv', ['ops', 'install'])
    __main__.main()
    assert capsys.readouterr().out == f"{lite}/_ext.py: torchvision's operators, version 1, installed\n"
    (lite / '_ext.so').touch()
    with pytest.raises(SystemExit, match=r'^python -m mmvitzoo\.ops: .* has compiled operators'):
        __main__.main()


def test_logged_command_installs_the_operators(tmp_path):
    """Imports mmvitzoo with a copy of mmcv without operators, then runs the command that the import logs."""
    (tmp_path / 'mmcv').mkdir()
    for path in Path(mmcv.__file__).parent.iterdir():
        if not path.name.startswith('_ext'):
            (tmp_path / 'mmcv' / path.name).symlink_to(path)
    code = (
        'import mmvitzoo, sys; from mmvitzoo.ops.__main__ import main\n'
        "sys.argv.append('install'); main(); import mmcv.ops; print(mmcv.ops.get_compiler_version())"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/mmcv/_ext.py: torchvision's operators, version 1, installed\nn/a\n"
    hint, source = done.stderr.splitlines()
    assert 'python -m mmvitzoo.ops install' in hint and 'come from torchvision' in source


def test_command_is_logged_once_by_main_process(monkeypatch, caplog):
    """Data workers, the installer and environments with operators do not log it."""
    monkeypatch.setattr(ops, 'find_spec', lambda name: None)
    monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)
    ops.suggest_install()
    assert [record.name for record in caplog.records] == ['mmvitzoo']
    with monkeypatch.context() as patch:
        patch.setattr(ops.multiprocessing, 'parent_process', lambda: 'a parent process')
        ops.suggest_install()
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'orig_argv', ['python', '-m', 'mmvitzoo.ops', 'status'], raising=False)
        ops.suggest_install()
    monkeypatch.setattr(ops, 'find_spec', lambda name: 'a module')
    ops.suggest_install()
    assert len(caplog.records) == 1
