"""BackboneLayerDecay: learning rates and weight decay in detectors and segmentors. ExactResumeHook: seeds."""

import re
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import worker_init_fn
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

import mmvitzoo.engine.layer_decay  # noqa: F401  registers the constructor
from mmvitzoo.engine import ExactResumeHook, exact_resume
from mmvitzoo.models import MPViT, PlainViT, SimpleFeaturePyramid


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Resets the default scope, which other tests change."""
    init_default_scope('mmdet')


pytestmark = pytest.mark.stack

LR, WEIGHT_DECAY, RATE = 1e-3, 0.1, 0.7
VIT = dict(embed_dims=48, num_layers=4, num_heads=3, mlp_ratio=2)
MPVIT = dict(num_paths=(1, 2, 2, 2), num_layers=(1, 2, 1, 1), embed_dims=(16, 24, 32, 40), mlp_ratios=(2, 2, 2, 2))


class Detector(nn.Module):
    """Model that, like detectors and segmentors, has no ``get_layer_depth``."""

    def __init__(self, backbone, channels):
        super().__init__()
        self.backbone = backbone
        self.neck = SimpleFeaturePyramid(channels, 8)
        self.head = nn.ModuleDict(dict(blocks=nn.ModuleList([nn.Linear(8, 8)]), norm=nn.LayerNorm(8)))
        self.head.register_parameter('pos_embed', nn.Parameter(torch.zeros(1, 8)))


def vit(**kwargs):
    options = dict(img_size=64, with_cls_token=False, window_size=2, residual_block_indexes=(3,), use_rel_pos=True)
    return Detector(PlainViT(VIT, **options, **kwargs), 48)


def mpvit():
    return Detector(MPViT(MPVIT), 40)


def vit_exponent(name):
    """Returns the exponent of the decay rate for a ViT of 4 blocks."""
    if name.startswith(('backbone.patch_embed.', 'backbone.pos_embed', 'backbone.cls_token')):
        return 5
    block = re.match(r'backbone\.blocks\.(\d)\.(?!residual)', name)
    return 4 - int(block[1]) if block else 0


def mpvit_exponent(name):
    """Returns the exponent of the decay rate for an MPViT with 1, 2, 1 and 1 blocks in its stages."""
    if name.startswith('backbone.stem.'):
        return 6
    stage = re.match(r'backbone\.stages\.(\d)\.', name)
    if not stage:
        return 0
    last_of_stage_1 = re.search(r'\.1\.(paths\.\d\.blocks\.1|aggregate)\.', name)
    return {0: 5, 1: 3 if last_of_stage_1 else 4, 2: 2, 3: 1}[int(stage[1])]


def param_groups(model, **paramwise_cfg):
    """Returns the parameter group of the optimizer for each parameter name."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=LR, weight_decay=WEIGHT_DECAY),
            constructor='BackboneLayerDecay',
            paramwise_cfg=paramwise_cfg,
        ),
    )
    names = {id(value): name for name, value in model.named_parameters()}
    groups = [(names[id(value)], group) for group in wrapper.optimizer.param_groups for value in group['params']]
    assert len(dict(groups)) == len(groups)
    return dict(groups)


@pytest.mark.parametrize(
    'build, exponent, deepest', [(vit, vit_exponent, 5), (mpvit, mpvit_exponent, 6)], ids=['PlainViT', 'MPViT']
)
def test_learning_rate_of_every_parameter(build, exponent, deepest):
    model = build()
    groups = param_groups(model, layer_decay_rate=RATE)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {exponent(name) for name in groups} == set(range(deepest + 1))
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * RATE ** exponent(name)), name
        assert group['weight_decay'] == WEIGHT_DECAY, name


def test_learning_rate_of_selected_parameters():
    groups = param_groups(vit(), layer_decay_rate=RATE)
    expected = {
        'backbone.pos_embed': 5,
        'backbone.patch_embed.proj.weight': 5,
        'backbone.blocks.0.attn.rel_pos_h': 4,
        'backbone.blocks.3.mlp.fc2.bias': 1,
        'backbone.blocks.3.residual.0.weight': 0,
        'backbone.norm.weight': 0,
        'neck.lateral_convs.0.conv.weight': 0,
        'head.blocks.0.weight': 0,
    }
    assert {name: groups[name]['lr'] for name in expected} == {
        name: pytest.approx(LR * RATE**exponent) for name, exponent in expected.items()
    }


def test_no_decay_by_default():
    assert {group['lr'] for group in param_groups(vit(), norm_decay_mult=0.0).values()} == {LR}


@pytest.mark.parametrize('build', [vit, mpvit])
def test_weight_decay(build):
    model = build()
    groups = param_groups(
        model, layer_decay_rate=RATE, norm_decay_mult=0.0, custom_keys=dict(pos_embed=dict(decay_mult=0.0))
    )
    modules = dict(model.named_modules())
    undecayed = {
        name
        for name in groups
        if name.endswith('pos_embed') or 'Norm' in type(modules[name.rpartition('.')[0]]).__name__
    }
    # LayerNorm2d and BatchNorm count as norms.
    assert {'head.norm.bias', 'head.pos_embed', 'neck.fpn_convs.0.ln.weight', 'neck.rescale.0.1.bias'} < undecayed
    if build is vit:
        assert {'backbone.pos_embed', 'backbone.blocks.3.residual.7.weight'} < undecayed
    else:
        assert 'backbone.stem.0.bn.weight' in undecayed
    for name, group in groups.items():
        assert group['weight_decay'] == (0 if name in undecayed else WEIGHT_DECAY), name


def test_frozen_parameters_are_not_optimized():
    model = vit(frozen_stages=2)
    groups = param_groups(model, layer_decay_rate=RATE)
    assert groups.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    assert 'backbone.blocks.1.norm1.weight' not in groups
    assert groups['backbone.blocks.2.norm1.weight']['lr'] == pytest.approx(LR * RATE**2)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_constructor_is_found_in_every_toolbox_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        groups = param_groups(vit(), layer_decay_rate=RATE)
    assert groups['backbone.pos_embed']['lr'] == pytest.approx(LR * RATE**5)


def test_in_mmdetection_detector():
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    model = MODELS.build(
        dict(
            type='RetinaNet',
            backbone=dict(type='PlainViT', arch=VIT, img_size=64),
            neck=dict(type='SimpleFeaturePyramid', in_channels=48, out_channels=8),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=2,
                in_channels=8,
                feat_channels=8,
                stacked_convs=1,
                anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8, 16, 32, 64]),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            ),
        )
    )
    assert not hasattr(model, 'get_layer_depth')
    groups = param_groups(model, layer_decay_rate=RATE)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {name for name in groups if name.startswith('bbox_head.')}
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * RATE ** vit_exponent(name)), name


def nested(**children):
    """Returns a module with these children."""
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def test_backbones_anywhere_in_the_model():
    """Each backbone has its own number of layers; the teacher of a semi-supervised detector is frozen."""
    teacher = vit().requires_grad_(False)
    model = nested(student=vit(), teacher=teacher, inner=nested(detector=mpvit()), classifier=nn.Linear(8, 2))
    groups = param_groups(model, layer_decay_rate=RATE)
    assert groups.keys() == {name for name, x in model.named_parameters() if not name.startswith('teacher.')}
    for name, group in groups.items():
        part, inside = re.fullmatch(r'(student|inner\.detector|classifier)\.(.*)', name).groups()
        exponents = {'student': vit_exponent, 'inner.detector': mpvit_exponent, 'classifier': lambda name: 0}
        assert group['lr'] == pytest.approx(LR * RATE ** exponents[part](inside)), name


def test_model_without_a_backbone():
    with pytest.raises(ValueError, match='no backbone in Linear has get_layer_depth'):
        param_groups(nn.Linear(8, 2), layer_decay_rate=RATE)


def test_wrapper_that_passes_the_call_on():
    """The names in a wrapper, such as MMPretrain's LoRAModel, are those of the module inside."""
    wrapper = nested(module=PlainViT(VIT, img_size=64))
    wrapper.get_layer_depth = wrapper.module.get_layer_depth
    groups = param_groups(nested(backbone=wrapper), layer_decay_rate=RATE)
    assert groups['backbone.module.blocks.1.attn.qkv.weight']['lr'] == pytest.approx(LR * RATE**3)


def hook_draws(call, rank, world_size, monkeypatch):
    """Returns the next random number of torch after a call of a hook method on a rank."""
    monkeypatch.setattr(exact_resume, 'get_rank', lambda: rank)
    monkeypatch.setattr(exact_resume, 'get_world_size', lambda: world_size)
    call()
    return torch.rand(1).item()


def test_exact_resume_iterations_and_ranks_draw_different_numbers(monkeypatch):
    hook, draws = ExactResumeHook(), {}
    for iteration, rank in product(range(4), range(3)):
        call = partial(hook.before_train_iter, SimpleNamespace(seed=7, iter=iteration), 0)
        draws[iteration, rank] = hook_draws(call, rank, 3, monkeypatch)
        assert hook_draws(call, rank, 3, monkeypatch) == draws[iteration, rank]
    assert len(set(draws.values())) == 12


def test_exact_resume_epochs_ranks_and_workers_draw_different_numbers(monkeypatch):
    draws, order = [], []
    for epoch, rank in product(range(3), range(2)):
        init_worker = partial(worker_init_fn, num_workers=2, rank=rank, seed=7)
        loader = SimpleNamespace(worker_init_fn=init_worker, _iterator=object())
        loop = object.__new__(EpochBasedTrainLoop)
        runner = SimpleNamespace(seed=7, epoch=epoch, train_loop=loop, train_dataloader=loader)
        order.append(hook_draws(partial(ExactResumeHook().before_train_epoch, runner), rank, 2, monkeypatch))
        assert loader._iterator is None
        for worker in range(2):
            loader.worker_init_fn(worker)
            draws.append(np.random.rand())
    assert len(set(draws)) == 12 and len(set(order)) == 6
