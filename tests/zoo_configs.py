"""Helpers for tests over all configs of the model zoo; a process reads each config once."""

import ast
import json
from collections import defaultdict
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import mmengine.config.config
import mmengine.config.utils
import yaml
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(
    str(path.relative_to(ROOT / 'configs')) for path in ROOT.glob('configs/*/*.py') if path.parent.name != '_base_'
)
RECIPES = [name for name in NAMES if 'mini' not in name]
FOLDERS = sorted({name.split('/')[0] for name in NAMES})
# Entries of the metafiles by config.
LISTED = {
    model['Config'][len('configs/') :]: model
    for path in sorted(ROOT.glob('configs/*/metafile.yml'))
    for model in yaml.safe_load(path.read_text())['Models']
}

# MMEngine reads all metafiles of a toolbox and reloads pkg_resources for each base from that toolbox, which is most of
# the time that reading a config takes.
mmengine.config.utils.load = lru_cache(maxsize=None)(mmengine.config.utils.load)
mmengine.config.config.is_installed = lru_cache(maxsize=None)(mmengine.config.config.is_installed)
mmengine.config.utils.MODULE2PACKAGE['mmseg'] = 'mmseg'  # as tools/train.py does for the second stack


@lru_cache(maxsize=None)
def _read(name):
    return Config.fromfile(ROOT / 'configs' / name)


def read_config(name):
    """Returns a copy of a config of this project, which a test may change."""
    return deepcopy(_read(name))


def read_stock_config(name):
    """Reads a config of a toolbox, such as ``'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'``."""
    return Config.fromstring(f'_base_ = [{name!r}]', '.py')


def bases(path):
    """Returns the entries of a config's ``_base_``: ``'package::path'`` or paths relative to the file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            value = ast.literal_eval(node.value)
            return value if isinstance(value, list) else [value]
    return []


def without_scope(value):
    """Drops ``_scope_``, which MMEngine writes into dicts from a toolbox's file."""
    if isinstance(value, dict):
        return {key: without_scope(item) for key, item in value.items() if key != '_scope_'}
    return [without_scope(item) for item in value] if isinstance(value, (list, tuple)) else value


def as_text(value):
    """Serializes a part of a config; equal parts give equal text."""
    return json.dumps(without_scope(value), sort_keys=True, default=str)


def group_by(key, names):
    """Groups configs with the same ``as_text(key(config))``; returns lists of names."""
    groups = defaultdict(list)
    for name in names:
        groups[as_text(key(_read(name)))].append(name)
    return list(groups.values())


def types_in(value):
    """Yields the ``type`` of all modules in a model's config, without norms, activations and training settings."""
    if isinstance(value, dict):
        if 'type' in value:
            yield str(value['type'])
        for key, item in value.items():
            if key not in ('data_preprocessor', 'train_cfg', 'test_cfg', 'init_cfg', 'norm_cfg', 'act_cfg'):
                yield from types_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from types_in(item)


def backbone_of(config):
    """Returns the config of the backbone, in LoRABackbone that of its module."""
    return config.model.backbone.get('module', config.model.backbone)


def module_types(config):
    """Returns the classes of detector, backbone, neck and heads, which distinguish kinds of models."""
    return sorted(set(types_in(config.model)))


def size(name):
    """Returns the number of parameters of a config's model."""
    return LISTED[name]['Metadata']['Parameters']
