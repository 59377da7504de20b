"""Finding a config: what there is by family and task, and each by its name."""

import difflib
import re
from pathlib import Path
from typing import Dict, List, Optional

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

FAMILIES = ('mpvit', 'mvitv2', 'scalablevit', 'plainvit', 'vitae')
TASKS = ('classification', 'detection', 'instance-segmentation', 'semantic-segmentation')


def list_models(family: Optional[str] = None, task: Optional[str] = None) -> List[str]:
    """Names of the configs that come with this package.

    Args:
        family: ``'mpvit'``, ``'mvitv2'``, ``'scalablevit'``, ``'plainvit'`` (with DeiT and ViTDet) or ``'vitae'``;
            None is all.
        task: ``'classification'``, ``'detection'``, ``'instance-segmentation'`` or ``'semantic-segmentation'``; None is
            all.

    Returns:
        Sorted names, such as ``'mask-rcnn_mpvit-tiny_fpn_1x_coco'``, for :func:`get_config`.

    Raises:
        ValueError: There is no such family or task.
    """
    for kind, value, known in (('family', family, FAMILIES), ('task', task, TASKS)):
        if value is not None and value not in known:
            raise ValueError(f'{kind} is one of {", ".join(known)}, got {value!r}')
    names = sorted(_files())
    if family is not None:
        names = [name for name in names if family_of(name) == family]
    if task is not None:
        names = [name for name in names if task in tasks_of(name)]
    return names


def get_config(name: str) -> Config:
    """The config of a name, or of a file.

    Args:
        name: One of :func:`list_models`, or the path of a config, whose bases may be of any toolbox.

    Returns:
        The config, merged with its bases. The inferencers of MMDetection, MMSegmentation and MMPretrain
        take it, and so does ``Runner.from_cfg`` (which also wants a ``work_dir``).

    Raises:
        ValueError: There is neither such a config nor such a file; the message names what is close to it.
    """
    path = Path(name) if Path(name).is_file() else _files().get(name)
    if path is None:
        close = difflib.get_close_matches(Path(name).stem, _files(), n=3, cutoff=0.5)
        hint = f'; close are {", ".join(close)}' if close else ''
        raise ValueError(f'{name}: no such config, neither a file nor one of mmvitzoo.list_models(){hint}')
    # MMEngine looks for a distribution of the module's name, which onedl's is not.
    MODULE2PACKAGE['mmseg'] = 'mmseg'
    return Config.fromfile(path)


def family_of(name: str) -> str:
    """One of :data:`FAMILIES`, by the name of a config of this package."""
    return re.search('deit|' + '|'.join(FAMILIES), name)[0].replace('deit', 'plainvit')


def tasks_of(name: str) -> List[str]:
    """Those of :data:`TASKS` that a config of this package is for, by its name, as OpenMMLab names configs."""
    if name.endswith(('_in1k', '_mini-classes')):
        return ['classification']
    if name.startswith(('mask-rcnn_', 'cascade-mask-rcnn_')):
        return ['detection', 'instance-segmentation']
    if name.startswith(('retinanet_', 'deformable-detr_')):
        return ['detection']
    return ['semantic-segmentation']


def _files() -> Dict[str, Path]:
    # An installed package carries the configs; in a clone that is only on the path they lie beside it.
    package = Path(__file__).parent
    root = package / '.mim' if (package / '.mim').is_dir() else package.parent
    return {path.stem: path for path in root.glob('configs/*/*.py') if path.parent.name != '_base_'}
