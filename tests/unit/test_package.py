"""Content of the wheel, supported Python versions, and requirement checks at import."""

import ast
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import mmvitzoo

ROOT = Path(__file__).resolve().parents[2]


def python(code, *path):
    """Runs code in a new interpreter with additional folders at the start of its path."""
    code = f'import sys; sys.path[:0] = {[str(folder) for folder in (*path, ROOT)]!r}\n{code}'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)


def test_models_do_not_import_checkpoints():
    """Imports run one way; the package's own __init__, which imports everything, is replaced by an empty module."""
    code = f"""
import types
package = sys.modules['mmvitzoo'] = types.ModuleType('mmvitzoo')
package.__path__ = [{str(ROOT / 'mmvitzoo')!r}]
import mmvitzoo.models
imported = {{name.split('.')[1] for name in sys.modules if name.startswith('mmvitzoo.')}}
assert imported == {{'models'}}, imported
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_backbones_are_exported():
    assert mmvitzoo.MPViT is mmvitzoo.models.MPViT
    assert {'MPViT', 'MViTv2', 'PlainViT', 'ScalableViT', 'ViTAE'} < set(mmvitzoo.__all__)


def test_wheel_contains_configs_and_tools(tmp_path):
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


def test_syntax_is_python_3_8():
    for path in (ROOT / 'mmvitzoo').rglob('*.py'):
        ast.parse(path.read_text(), str(path), feature_version=(3, 8))


@pytest.mark.stack
def test_backbone_does_not_import_mmcv_ops():
    """The scope in the type of the backbone imports the package."""
    code = (
        "sys.modules['mmcv.ops'] = sys.modules['mmcv._ext'] = None\n"
        'import torch\n'
        'from mmengine.registry import MODELS\n'
        "print(len(MODELS.build(dict(type='mmvitzoo.MPViT'))(torch.zeros(1, 3, 64, 64))))"
    )
    done = python(code)
    assert done.stdout.strip() == '4', done.stderr


def test_requirements_are_checked_before_imports(tmp_path):
    """The import of the package names an outdated requirement instead of failing in code that uses it."""
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text("__version__ = '1.7.2'")
    done = python('import mmvitzoo', tmp_path)
    assert 'ImportError: mmvitzoo requires mmcv >= ' in done.stderr and ', found 1.7.2: ' in done.stderr


@pytest.mark.parametrize(
    'name, version', [('timm', '0.5.4'), ('mmengine', '0.7.4'), ('mmcv', '1.7.2'), ('torch', '1.13.1+cu117')]
)
def test_outdated_requirement_is_an_import_error(name, version, monkeypatch):
    monkeypatch.setattr(sys.modules[name], '__version__', version)
    with pytest.raises(ImportError, match=re.escape(f', found {version}: ')) as error:
        mmvitzoo._check_requirements()
    assert str(error.value).startswith(f'mmvitzoo requires {name} >= ')


@pytest.mark.parametrize('name, version', [('mmdet', '2.28.2'), ('mmsegmentation', '0.30.0'), ('mmpretrain', '0.9.0')])
def test_outdated_toolbox_is_a_warning(tmp_path, name, version, monkeypatch):
    (tmp_path / f'{name}-{version}.dist-info').mkdir()
    (tmp_path / f'{name}-{version}.dist-info' / 'METADATA').write_text(
        f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=f'^mmvitzoo supports {name} >= .*, found {version}: mim install'):
        mmvitzoo._check_requirements()


def test_toolboxes_are_optional(monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(mmvitzoo, 'installed_version', not_installed)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mmvitzoo._check_requirements()


def test_broken_requirement_is_not_reported_as_missing(tmp_path, monkeypatch):
    (tmp_path / 'timm.py').write_text('import a_module_of_its_own')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'timm')
    with pytest.raises(ModuleNotFoundError, match="^No module named 'a_module_of_its_own'$"):
        mmvitzoo._check_requirements()


@pytest.mark.parametrize('name', ['mmengine', 'mmcv', 'timm', 'einops', 'safetensors'])
def test_missing_requirement_is_an_import_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f'^mmvitzoo requires {name} >= .*, which is not installed: '):
        mmvitzoo._check_requirements()
