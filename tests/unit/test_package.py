"""What is installed, and what importing it says and needs."""

import ast
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import mmvitzoo

ROOT = Path(__file__).resolve().parents[2]


def python(code, *path):
    """Runs code in a fresh interpreter with folders in front of its path."""
    code = f'import sys; sys.path[:0] = {[str(folder) for folder in (*path, ROOT)]!r}\n{code}'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)


def test_wheel_carries_configs_and_tools(tmp_path):
    ignored = shutil.ignore_patterns('.*', '__pycache__', 'data', 'work_dirs', 'tests')
    shutil.copytree(ROOT, tmp_path / 'source', ignore=ignored)
    command = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        tmp_path,
        tmp_path / 'source',
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob('*.whl')
    assert wheel.name == f'mmvitzoo-{mmvitzoo.__version__}-py3-none-any.whl'
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith('METADATA'))).decode()
    expected = {
        f'mmvitzoo/.mim/{path.relative_to(ROOT)}'
        for folder in ('configs', 'tools')
        for path in (ROOT / folder).rglob('*.*')
        if path.suffix in ('.py', '.sh', '.yml', '.md')
    }
    assert expected | {'mmvitzoo/.mim/model-index.yml', 'mmvitzoo/models/backbones/mpvit.py'} <= names
    assert not any(name.startswith(('tests', 'configs', 'tools')) for name in names)
    required = {
        line.split()[1].split('>')[0]
        for line in metadata.splitlines()
        if line.startswith('Requires-Dist') and 'extra' not in line
    }
    assert required == {'timm', 'einops', 'safetensors'}


def test_sources_are_python_3_8():
    for path in (ROOT / 'mmvitzoo').rglob('*.py'):
        ast.parse(path.read_text(), str(path), feature_version=(3, 8))


@pytest.mark.stack
def test_backbone_needs_no_compiled_operators():
    """mmcv-lite has neither of the two."""
    code = (
        "sys.modules['mmcv.ops'] = sys.modules['mmcv._ext'] = None\n"
        'import torch, mmvitzoo\n'
        'from mmengine.registry import MODELS\n'
        "print(len(MODELS.build(dict(type='MPViT'))(torch.zeros(1, 3, 64, 64))))"
    )
    done = python(code)
    assert done.stdout.strip() == '4', done.stderr


@pytest.mark.stack
def test_scoped_name_needs_no_import():
    code = "from mmengine.registry import MODELS; print(MODELS.get('mmvitzoo.MPViT').__name__)"
    done = python(code)
    assert done.stdout.strip() == 'MPViT', done.stderr


@pytest.mark.parametrize(
    'name, version', [('timm', '0.5.4'), ('mmengine', '0.7.4'), ('mmcv', '1.7.2'), ('torch', '1.13.1+cu117')]
)
def test_says_what_is_too_old(tmp_path, name, version):
    (tmp_path / name).mkdir()
    (tmp_path / name / '__init__.py').write_text(f'__version__ = {version!r}')
    done = python('import mmvitzoo', tmp_path)
    assert f'ImportError: mmvitzoo needs {name} >= ' in done.stderr and f', found {version}: ' in done.stderr


@pytest.mark.parametrize('name, version', [('mmdet', '2.28.2'), ('mmsegmentation', '0.30.0'), ('mmpretrain', '0.9.0')])
def test_says_which_toolbox_is_too_old(tmp_path, name, version):
    (tmp_path / f'{name}-{version}.dist-info').mkdir()
    (tmp_path / f'{name}-{version}.dist-info' / 'METADATA').write_text(
        f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
    )
    done = python('import mmvitzoo', tmp_path)
    assert f'ImportError: mmvitzoo needs {name} >= ' in done.stderr and f', found {version}: ' in done.stderr


def test_toolboxes_are_optional(monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(mmvitzoo, 'installed_version', not_installed)
    mmvitzoo._check_requirements()


def test_a_broken_requirement_is_not_called_missing(tmp_path):
    (tmp_path / 'timm.py').write_text('import a_module_of_its_own')
    assert python('import mmvitzoo', tmp_path).stderr.endswith("No module named 'a_module_of_its_own'\n")


@pytest.mark.parametrize('name', ['mmengine', 'mmcv', 'timm', 'einops', 'safetensors'])
def test_says_what_is_missing(name):
    code = (
        'import importlib.abc\n'
        'class Missing(importlib.abc.MetaPathFinder):\n'
        '    def find_spec(self, fullname, path, target=None):\n'
        f'        if fullname == {name!r}: raise ModuleNotFoundError(name=fullname)\n'
        'sys.meta_path.insert(0, Missing())\n'
        'import mmvitzoo'
    )
    done = python(code)
    assert f'ImportError: mmvitzoo needs {name} >= ' in done.stderr and 'which is not installed: ' in done.stderr
