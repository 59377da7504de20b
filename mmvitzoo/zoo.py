"""Lists the configs of this package by family and task, and loads them by name."""

import difflib
import fnmatch
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Union

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')
FAMILIES = ('mpvit', 'mvitv2', 'scalablevit', 'plainvit', 'vitae', 'timm')
# Backbones that the configs take from timm.
TIMM_BACKBONES = ('convnextv2', 'eva02', 'sam2-hiera', 'swinv2')
TASKS = ('classification', 'detection', 'instance-segmentation', 'semantic-segmentation')


def list_models(family: Optional[str] = None, task: Optional[str] = None, pattern: Optional[str] = None) -> List[str]:
    """Lists the names of the configs of this package.

    Args:
        family: ``'mpvit'``, ``'mvitv2'``, ``'scalablevit'``, ``'plainvit'`` (with DeiT, DINOv2, DINOv3 and ViTDet),
            ``'vitae'``, or ``'timm'`` (Swin V2, ConvNeXt V2, EVA-02, SAM 2). None: all families.
        task: ``'classification'``, ``'detection'``, ``'instance-segmentation'`` or ``'semantic-segmentation'``.
            None: all tasks.
        pattern: Wildcard pattern of whole names, such as ``'mask-rcnn*coco'``. None: all names.

    Returns:
        Sorted names, such as ``'mask-rcnn_mpvit-tiny_fpn_1x_coco'``, for :func:`get_config`.

    Raises:
        ValueError: The family or task is unknown.
    """
    for argument, value, choices in (('family', family, FAMILIES), ('task', task, TASKS)):
        if value is not None and value not in choices:
            hint = '; pattern= takes wildcards' if '*' in str(value) else ''
            raise ValueError(f'{argument} must be one of {", ".join(choices)}, got {value!r}{hint}')
    names = sorted(config_files())
    if pattern is not None:
        names = fnmatch.filter(names, pattern)
    if family is not None:
        names = [name for name in names if family_of(name) == family]
    if task is not None:
        names = [name for name in names if task in tasks_of(name)]
    return names


def get_config(name: str) -> Config:
    """Loads a config by its name or path.

    Args:
        name: Name from :func:`list_models`, or path of a config file. Bases of the file may belong to any toolbox.

    Returns:
        The config merged with its bases. The inferencers of MMDetection, MMSegmentation and MMPretrain accept it.
        ``Runner.from_cfg`` accepts it once ``work_dir`` is set. Configs with classes as types get a ``default_scope``.

    Raises:
        ValueError: There is no such config or file; the message lists similar names.
    """
    path = Path(name) if Path(name).is_file() else config_files().get(name)
    if path is None:
        similar = similar_names(Path(name).stem, config_files())
        raise ValueError(f'{name}: no such config, neither a file nor one of mmvitzoo.list_models(){similar}')
    # MMEngine looks up the distribution mmsegmentation; on the onedl stack it is called onedl-mmsegmentation.
    MODULE2PACKAGE['mmseg'] = 'mmseg'
    config = Config.fromfile(path)
    set_default_scope(config)
    return config


def set_default_scope(config: Config) -> None:
    """Sets the ``default_scope`` of a config without one to the toolbox of its model's class, in place.

    Args:
        config: Config. In the new style, in which types are imported classes, its ``default_scope`` is None.
    """
    if config.get('default_scope') is None:
        model_type = (config.get('model') or {}).get('type')
        classes = getattr(model_type, '__mro__', ())  # a class of the user inherits from one of a toolbox
        names = [model_type] if isinstance(model_type, str) else [base.__module__ for base in classes]
        scopes = [name.split('.')[0] for name in names if name.split('.')[0] in TOOLBOXES]
        if scopes:
            config.default_scope = scopes[0]


def name_types(part: Union[Dict[str, Any], List[Any]]) -> None:
    """Replaces classes in a part of a config by names such as ``'mmdet.L1Loss'``, in place.

    MMEngine writes full paths to a file. That of this class leads nowhere: ``mmdet.models.losses`` has a function with
    the name of the module.

    Args:
        part: Part of a config in the new style, in which types are imported classes.
    """
    for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
        package = value.__module__.split('.')[0] if isinstance(value, type) else None
        if package in (*TOOLBOXES, 'mmvitzoo'):
            part[key] = f'{package}.{value.__name__}'
        elif isinstance(value, (dict, list)):
            name_types(value)


def type_name(value: Any) -> str:
    """Returns the name of a type in a config: the class, its name, or a name with scope or module."""
    return value.split('.')[-1] if isinstance(value, str) else value.__name__


def family_of(name: str) -> str:
    """Returns the family, one of :data:`FAMILIES`, of a config name of this package."""
    found = re.search('|'.join(('deit', 'dinov2', 'dinov3', *TIMM_BACKBONES, *FAMILIES)), name)[0]
    if found in TIMM_BACKBONES:
        return 'timm'
    return found if found in FAMILIES else 'plainvit'


def tasks_of(name: str) -> List[str]:
    """Returns the tasks, out of :data:`TASKS`, of a config name of this package."""
    if name.endswith(('_in1k', '_mini-classes')):
        return ['classification']
    if name.startswith(('mask-rcnn_', 'cascade-mask-rcnn_')):
        return ['detection', 'instance-segmentation']
    if name.startswith(('atss_', 'retinanet_', 'deformable-detr_')):
        return ['detection']
    return ['semantic-segmentation']


def similar_names(name: str, names: Iterable[str]) -> str:
    """Returns the end of an error message, such as ``'; did you mean a or b?'``, empty without similar names."""
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f'; did you mean {" or ".join(similar)}?' if similar else ''


def root() -> Path:
    """Returns the folder of ``configs`` and ``model-index.yml``."""
    # An installed package carries the configs in .mim. In a clone on the Python path they lie beside the package.
    package = Path(__file__).parent
    return package / '.mim' if (package / '.mim').is_dir() else package.parent


def config_files() -> Dict[str, Path]:
    """Returns the config files by name."""
    return {path.stem: path for path in root().glob('configs/*/*.py') if path.parent.name != '_base_'}
