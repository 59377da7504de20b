"""Vision-transformer backbones for OpenMMLab.

``custom_imports = dict(imports=['mmvitzoo'])`` in a config is all it takes: importing this package
checks what it stands on, registers every model and hook and lets MMEngine load its own checkpoints.
"""

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from .version import __version__

# Module, oldest version that works, and what to type if it is missing or older.
REQUIRED = (
    ('torch', '2.1.0', 'pip install "torch>=2.1"'),
    ('mmengine', '0.10.0', 'pip install mmengine'),
    ('mmcv', '2.0.0', 'pip install mmcv-lite==2.1.0, then python -m mmvitzoo.ops install'),
    ('einops', '0.6.1', 'pip install "einops>=0.6.1"'),
    ('timm', '0.9.0', 'pip install "timm>=0.9"'),
    ('safetensors', '0.3.1', 'pip install "safetensors>=0.3.1"'),
)
# Toolboxes that may be there: distributions, oldest version that works. They are not imported for it.
TOOLBOXES = (
    ('mmdet', '3.0.0', 'mim install "mmdet>=3.0.0"'),
    ('mmsegmentation', '1.0.0', 'mim install "mmsegmentation>=1.0.0"'),
    ('mmpretrain', '1.0.0', 'mim install "mmpretrain>=1.0.0"'),
)


def _numbers(version: str) -> list:
    return [int(number) for number in re.findall('[0-9]+', version)[:3]]


def _check_requirements() -> None:
    for name, oldest, remedy in REQUIRED:
        try:
            version = getattr(import_module(name), '__version__', None)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            version = None
        if version is None:  # also a folder that pip uninstall left, which has no version
            raise ImportError(f'mmvitzoo needs {name} >= {oldest}, which is not installed: {remedy}')
        if _numbers(version) < _numbers(oldest):
            raise ImportError(f'mmvitzoo needs {name} >= {oldest}, found {version}: {remedy}')
    for name, oldest, remedy in TOOLBOXES:
        try:
            version = installed_version(name)
        except PackageNotFoundError:
            continue
        if _numbers(version) < _numbers(oldest):
            raise ImportError(f'mmvitzoo needs {name} >= {oldest}, found {version}: {remedy}')


_check_requirements()

from .checkpoints import trust_mmengine_checkpoints  # noqa: E402
from .ops import suggest_install  # noqa: E402
from .registry import MODELS  # noqa: E402
from .zoo import get_config, list_models  # noqa: E402

suggest_install()
trust_mmengine_checkpoints()
import_module('mmvitzoo.models')
import_module('mmvitzoo.engine')

__all__ = ['MODELS', '__version__', 'get_config', 'list_models']
