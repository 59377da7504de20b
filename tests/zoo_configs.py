"""The configs of the model zoo: each is read once per process, and equal parts are found."""

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
# Entries of the metafiles, by config.
LISTED = {
    model['Config'][len('configs/') :]: model
    for path in sorted(ROOT.glob('configs/*/metafile.yml'))
    for model in yaml.safe_load(path.read_text())['Models']
}

# For every base of a toolbox, MMEngine reads all metafiles of that toolbox and reloads pkg_resources: most of the
# time that reading a config takes.
mmengine.config.utils.load = lru_cache(maxsize=None)(mmengine.config.utils.load)
mmengine.config.config.is_installed = lru_cache(maxsize=None)(mmengine.config.config.is_installed)
mmengine.config.utils.MODULE2PACKAGE['mmseg'] = 'mmseg'  # as tools/train.py does for the second stack


@lru_cache(maxsize=None)
def _read(name):
    return Config.fromfile(ROOT / 'configs' / name)


def read_config(name):
    """A config of this project, as a copy that may be changed."""
    return deepcopy(_read(name))


def read_stock_config(name):
    """A config of a toolbox, such as ``'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'``."""
    return Config.fromstring(f'_base_ = [{name!r}]', '.py')


def without_scope(value):
    """Drops the ``_scope_`` that MMEngine writes into every dict from another package."""
    if isinstance(value, dict):
        return {key: without_scope(item) for key, item in value.items() if key != '_scope_'}
    return [without_scope(item) for item in value] if isinstance(value, (list, tuple)) else value


def as_text(value):
    """Text that is equal for equal configs."""
    return json.dumps(without_scope(value), sort_keys=True, default=str)


def group_by(key, names):
    """Lists of the names with the same ``as_text(key(config))``."""
    groups = defaultdict(list)
    for name in names:
        groups[as_text(key(_read(name)))].append(name)
    return list(groups.values())
