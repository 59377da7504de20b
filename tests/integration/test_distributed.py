"""Distributed and FSDP trainings on a CPU equal trainings in one process."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from forms import FORMS, free_port
from mmengine._strategy import DDPStrategy
from mmengine.config import Config
from mmengine.model import MMFullyShardedDataParallel
from mmengine.registry import FUNCTIONS, STRATEGIES, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmvitzoo.engine import wrap_blocks
from mmvitzoo.models import PlainViT

# SGD is used to compare gradients. Adam would amplify rounding errors of gradients that are zero in exact arithmetic,
# such as those of the key bias in attention.
CONFIG = """
_base_ = ['mmpretrain::_base_/default_runtime.py']
custom_imports = dict(imports=['mmvitzoo'])
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=10, mean=[127.5] * 3, std=[60.0] * 3),
    backbone=dict(type='{type}', arch={arch}, **{options}),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels={channels}, loss=dict(type='CrossEntropyLoss')),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root='data/mini/classes/train',
        indices=list(range(0, 480, 20)),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackInputs')],
    ),
)
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9), clip_grad=dict(max_norm=5))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2), logger=dict(interval=1))
randomness = dict(seed=0)
"""
WITH_BN = ('mpvit', 'vitae', 'vitae_s')
FSDP = """
_base_ = ['{base}', 'configs/_base_/strategies/fsdp.py']
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.1),
    constructor='BackboneLayerDecay',
    paramwise_cfg=dict(layer_decay_rate=0.7, norm_decay_mult=0.0),
)
custom_imports = dict(imports=['mmvitzoo', 'mmvitzoo.engine.layer_decay'])
"""


def write_config(workspace, form):
    """Writes the config of a classifier; BatchNorm is frozen, since its statistics depend on the batch of a process."""
    build = FORMS[form].build
    options = dict(build.keywords, out_indices=(3,), **(dict(norm_eval=True) if form in WITH_BN else {}))
    text = CONFIG.format(
        type=build.func.__name__, arch=build.args[0], options=options, channels=FORMS[form].channels[-1]
    )
    (workspace / f'classify_{form}.py').write_text(text)
    return f'classify_{form}.py'


def weights(path):
    return torch.load(path, weights_only=True)['state_dict']


def losses(output):
    return [float(x) for x in re.findall(r'Epoch\(train\).* loss: (\S+)', output)]


@pytest.fixture
def train_two(run):
    """Returns a function that trains a config with two processes and returns their output."""

    def train_two(config, folder, options=''):
        return run(f'tools/dist_train.sh {config} 2 --work-dir work_dirs/{folder} {options}', PORT=free_port())

    return train_two


slow = pytest.mark.slow


@pytest.mark.parametrize('form', ['vitdet', *(pytest.param(form, marks=slow) for form in ('mpvit', 'mvitv2_windows'))])
def test_two_processes_equal_one_with_double_batch_size(form, train_two, workspace, monkeypatch):
    """Also proves that every parameter is used: DDP raises an error in the second step otherwise."""
    config = write_config(workspace, form)
    train_two(config, f'{form}_two')
    monkeypatch.chdir(workspace)
    single = Config.fromfile(config)
    single.work_dir = f'work_dirs/{form}_one'
    single.train_dataloader.batch_size = 8
    Runner.from_cfg(single).train()
    two, one = (weights(workspace / f'work_dirs/{form}_{name}/epoch_1.pth') for name in ('two', 'one'))
    assert two.keys() == one.keys()
    for key, value in one.items():
        assert (two[key] - value).abs().max() < 1e-5, key


@slow
@pytest.mark.parametrize('form', ['vitdet', 'mpvit'])
def test_fsdp_training_equals_ddp_training(form, train_two, workspace):
    """Layer decay is used, checkpoints are unsharded, and the training is resumed."""
    base = write_config(workspace, form)
    sharded = FSDP.format(base=base)
    (workspace / f'sharded_{form}.py').write_text(sharded)
    (workspace / f'plain_{form}.py').write_text(sharded.replace(", 'configs/_base_/strategies/fsdp.py'", ''))
    outputs = [train_two(f'{name}_{form}.py', f'{name}_{form}') for name in ('sharded', 'plain')]
    assert 'FSDP' in outputs[0]
    first, second = map(losses, outputs)
    assert len(first) == 3 and first == pytest.approx(second, rel=1e-3)
    sharded, plain = (weights(workspace / f'work_dirs/{name}_{form}/epoch_1.pth') for name in ('sharded', 'plain'))
    assert sharded.keys() == plain.keys()
    output = train_two(f'sharded_{form}.py', f'sharded_{form}', '--resume --cfg-options train_cfg.max_epochs=2')
    assert 'resumed epoch: 1' in output and len(losses(output)) == 3


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('path', sorted(ROOT.glob('configs/vitdet/sharded/*.py')), ids=lambda path: path.stem)
def test_sharded_configs_equal_base_recipe(path):
    """Strategies have valid arguments; those of DeepSpeed are not run, since it is not installed."""
    config = Config.fromfile(path)
    recipe = Config.fromfile(path.parents[1] / f'{path.stem.rpartition("_")[0]}.py')
    assert config.model == recipe.model and config.param_scheduler == recipe.param_scheduler
    assert config.optim_wrapper.paramwise_cfg == recipe.optim_wrapper.paramwise_cfg
    assert config.runner_type == 'FlexibleRunner'
    init_default_scope(config.default_scope)
    strategy = dict(config.strategy)
    strategy_type = STRATEGIES.get(strategy.pop('type'))
    assert issubclass(strategy_type, DDPStrategy) or 'deepspeed' in path.stem
    assert strategy.keys() <= {name for base in strategy_type.__mro__ for name in inspect.signature(base).parameters}
    if 'fsdp' in path.stem:
        wrapper = strategy['model_wrapper']
        assert wrapper.keys() <= inspect.signature(MMFullyShardedDataParallel).parameters.keys()
        assert FUNCTIONS.get(wrapper.auto_wrap_policy) is wrap_blocks


def test_wrap_policy_selects_blocks():
    model = nn.Sequential(PlainViT(dict(embed_dims=8, num_layers=3, num_heads=1, mlp_ratio=1)))
    units = [name for name, module in model.named_modules() if wrap_blocks(module, False, 0)]
    assert units == [f'0.blocks.{i}' for i in range(3)] and wrap_blocks(model, True, 0)
