"""Launcher behind ``tools/train.py`` and ``tools/test.py`` for the three toolboxes.

The launcher prepares the process and then runs the script of the toolbox that a config belongs to. The preparation
covers distributed training without a GPU, which MMEngine does not support, and ``mmseg::`` bases on the onedl stack.
"""

import argparse
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import MODELS

from ..checkpoints import CheckpointError
from ..checkpoints.pretrained import missing_pretrained
from ..zoo import TOOLBOXES, get_config, type_name


def run_toolbox_script(name: str) -> None:
    """Runs ``tools/<name>.py`` of the toolbox of the config in ``sys.argv``.

    Args:
        name: Name of the script, ``'train'`` or ``'test'``.

    Raises:
        SystemExit: No config is given, or its ``default_scope`` is not one of the three toolboxes. That toolbox is not
            installed or has no such script. A checkpoint does not exist or does not fit.
    """
    files = [arg for arg in sys.argv[1:] if arg.endswith(('.py', '.yaml', '.yml', '.json'))]
    names = [arg for arg in sys.argv[1:2] if not arg.startswith('-')]
    path = next(iter(files + names), None)
    if path is None:
        print(f'usage: {name}.py CONFIG [arguments of the toolbox; {name}.py CONFIG -h lists them]')
        sys.exit('-h' not in sys.argv and '--help' not in sys.argv)
    config = read_config(path)
    sys.argv[sys.argv.index(path)] = str(config.filename)  # the toolboxes take no names
    if int(os.environ.get('WORLD_SIZE', 1)) > 1 and not torch.cuda.is_available():
        # The user's options stay last, since the last one of a name counts.
        index = sys.argv.index('--cfg-options') if '--cfg-options' in sys.argv else len(sys.argv)
        sys.argv[index:index] = _distribute_on_cpu(config)
    sys.argv[0] = str(_script(config.default_scope, name))
    if name == 'train' and '--resume' not in sys.argv:
        _check_pretrained(config)
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except CheckpointError as error:
        sys.exit(str(error))


def read_config(path: str) -> Config:
    """Loads a config of one of the three toolboxes; exits with a message if that fails.

    Args:
        path: Path or name of a config, see :func:`mmvitzoo.get_config`.

    Returns:
        The config merged with its bases.

    Raises:
        SystemExit: There is no such config, or its ``default_scope`` is not one of the three toolboxes.
    """
    try:
        config = get_config(path)
    except ValueError as error:
        sys.exit(str(error))
    scope = config.get('default_scope')
    if scope not in TOOLBOXES:
        sys.exit(f'{path}: default_scope must be one of {", ".join(TOOLBOXES)}, got {scope!r}')
    return config


def _check_pretrained(config: Config) -> None:
    """Exits if the pretrained weights of the backbone do not exist, before models and data are built."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    config.merge_from_dict(parser.parse_known_args()[0].cfg_options)
    backbone = config.model.get('backbone', {})
    init_cfg = backbone.get('module', backbone).get('init_cfg')  # LoRABackbone has the config of its module
    for cfg in init_cfg if isinstance(init_cfg, list) else [init_cfg or {}]:
        file = cfg.get('checkpoint')
        if file and '://' not in file and not Path(file).is_file():
            sys.exit(missing_pretrained(file))


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
    """Initializes a gloo process group; returns the ``--cfg-options`` with which MMEngine uses it."""
    import mmcv.cnn  # noqa: F401  registers the norms

    print_log('No GPU found: distributed processes use the gloo backend', logger='current')
    dist.init_process_group('gloo')
    # SyncBN does not run on a CPU; each process normalizes its own batch.
    MODELS.register_module('SyncBN', module=torch.nn.BatchNorm2d, force=True)
    if config.get('runner_type') == 'FlexibleRunner':
        if 'FSDP' not in type_name(config.strategy.type):
            return []
        # Offloading to the CPU frees the original, which on a CPU is the same memory.
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
