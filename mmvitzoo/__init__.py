"""Vision-transformer backbones for OpenMMLab.

A config needs ``custom_imports = dict(imports=['mmvitzoo'])``. Importing this package checks the installed
versions, registers all models and hooks, allows MMEngine to load its own checkpoints with PyTorch >= 2.6, and makes
the toolboxes find the models by name.
"""

import re
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from .version import __version__

# Module, minimum version, command that installs it.
REQUIRED = (
    ('torch', '2.1.0', 'pip install "torch>=2.1"'),
    ('mmengine', '0.10.0', 'pip install mmengine'),
    ('mmcv', '2.0.0', 'pip install mmcv-lite==2.1.0, then python -m mmvitzoo.ops install'),
    ('einops', '0.6.1', 'pip install "einops>=0.6.1"'),
    ('timm', '0.9.9', 'pip install "timm>=0.9.9"'),
    ('safetensors', '0.3.1', 'pip install "safetensors>=0.3.1"'),
)
# Optional toolboxes: distribution, minimum version, command that installs it. They are not imported for the check.
TOOLBOXES = (
    ('mmdet', '3.0.0', 'mim install "mmdet>=3.0.0"'),
    ('mmsegmentation', '1.0.0', 'mim install "mmsegmentation>=1.0.0"'),
    ('mmpretrain', '1.0.0', 'mim install "mmpretrain>=1.0.0"'),
)


def _parse_version(version: str) -> list:
    return [int(number) for number in re.findall('[0-9]+', version)[:3]]


def _check_requirements() -> None:
    """Raises ImportError if a required package is missing or too old; warns if a toolbox is too old."""
    for name, minimum, command in REQUIRED:
        try:
            version = getattr(import_module(name), '__version__', None)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            version = None
        if version is None:  # an empty folder left by pip uninstall can be imported, too
            raise ImportError(f'mmvitzoo requires {name} >= {minimum}, which is not installed: {command}')
        if _parse_version(version) < _parse_version(minimum):
            raise ImportError(f'mmvitzoo requires {name} >= {minimum}, found {version}: {command}')
    for name, minimum, command in TOOLBOXES:
        try:
            version = installed_version(name)
        except PackageNotFoundError:
            continue
        if _parse_version(version) < _parse_version(minimum):
            warnings.warn(f'mmvitzoo supports {name} >= {minimum}, found {version}: {command}', stacklevel=2)


_check_requirements()

from .checkpoints import extend_mmengine, trust_mmengine_checkpoints  # noqa: E402
from .engine.toolboxes import extend_toolboxes  # noqa: E402
from .models import MPViT, MViTv2, PlainViT, ScalableViT, TimmBackbone, ViTAE  # noqa: E402
from .models.layers import optimize_for_inference  # noqa: E402
from .ops import suggest_install  # noqa: E402
from .registry import MODELS  # noqa: E402
from .zoo import get_config, list_models  # noqa: E402

suggest_install()
trust_mmengine_checkpoints()
extend_mmengine()
extend_toolboxes()
import_module('mmvitzoo.engine')

__all__ = [
    'MODELS',
    'MPViT',
    'MViTv2',
    'PlainViT',
    'ScalableViT',
    'TimmBackbone',
    'ViTAE',
    '__version__',
    'get_config',
    'list_models',
    'optimize_for_inference',
]
