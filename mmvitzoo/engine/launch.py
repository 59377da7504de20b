"""One ``tools/train.py`` and ``tools/test.py`` for three toolboxes.

The toolbox that a config belongs to ships scripts that know its arguments best; ours prepare the
process and hand over to them. What needs preparing: distribution without a GPU, for which MMEngine
has no way, and ``mmseg::`` bases on the onedl stack.
"""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS

from ..zoo import get_config

TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')


def run_toolbox_script(name: str) -> None:
    """Runs ``tools/<name>.py`` of the toolbox whose config stands in ``sys.argv``.

    Args:
        name: ``'train'`` or ``'test'``.

    Raises:
        SystemExit: No config is given, its ``default_scope`` is none of the three toolboxes, or that
            toolbox is not installed or has no such script.
    """
    path = next((arg for arg in sys.argv[1:] if arg.endswith(('.py', '.yaml', '.yml', '.json'))), None)
    if path is None:
        print(f'usage: {name}.py CONFIG [arguments of the toolbox that it is for; CONFIG -h lists them]')
        sys.exit('-h' not in sys.argv and '--help' not in sys.argv)
    config = read_config(path)
    if int(os.environ.get('WORLD_SIZE', 1)) > 1 and not torch.cuda.is_available():
        # Before the user's own options, of which the last counts.
        place = sys.argv.index('--cfg-options') if '--cfg-options' in sys.argv else len(sys.argv)
        sys.argv[place:place] = _distribute_on_cpu(config)
    sys.argv[0] = str(_script(config.default_scope, name))
    runpy.run_path(sys.argv[0], run_name='__main__')


def read_config(path: str) -> Config:
    """Reads the config of a model of the three toolboxes.

    Args:
        path: A file or a name, see :func:`mmvitzoo.get_config`.

    Returns:
        The config, merged with its bases.

    Raises:
        SystemExit: There is no such config, or its ``default_scope`` is none of the three toolboxes.
    """
    try:
        config = get_config(path)
    except ValueError as error:
        sys.exit(str(error))
    scope = config.get('default_scope')
    if scope not in TOOLBOXES:
        sys.exit(f'{path}: default_scope is one of {", ".join(TOOLBOXES)}, got {scope!r}')
    return config


def _script(toolbox: str, name: str) -> Path:
    spec = find_spec(toolbox)
    if spec is None:
        sys.exit(f'{toolbox} is not installed: mim install {toolbox}')
    package = Path(next(iter(spec.submodule_search_locations)))
    for folder in (package / '.mim' / 'tools', package.parent / 'tools'):
        if (folder / f'{name}.py').is_file():
            return folder / f'{name}.py'
    sys.exit(f'{package}: has no tools/{name}.py')


def _distribute_on_cpu(config: Config) -> list:
    """Joins a gloo group; returns the options that let MMEngine work in it."""
    import mmcv.cnn  # noqa: F401  registers the norms

    print_log('No GPU: the processes talk through gloo', logger='current')
    dist.init_process_group('gloo')
    # SyncBN exists only for GPUs; each process normalises its own batch.
    MODELS.register_module('SyncBN', module=torch.nn.BatchNorm2d, force=True)
    if config.get('runner_type') == 'FlexibleRunner':
        if 'FSDP' not in config.strategy.type:
            return []
        # On a CPU, FSDP would free what it took off the device, which is the same memory.
        return [
            '--cfg-options',
            'strategy.model_wrapper.device_id=cpu',
            'strategy.state_dict_cfg.state_dict_config.offload_to_cpu=False',
            'strategy.state_dict_cfg.optim_state_dict_config.offload_to_cpu=False',
        ]
    unused = config.get('find_unused_parameters', False) or 'find_unused_parameters=True' in sys.argv
    return [
        '--cfg-options',
        'model_wrapper_cfg.type=MMDistributedDataParallel',
        'model_wrapper_cfg.device_ids=None',
        'model_wrapper_cfg.broadcast_buffers=False',
        f'model_wrapper_cfg.find_unused_parameters={unused}',
    ]
