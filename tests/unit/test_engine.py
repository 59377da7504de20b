"""BackboneLayerDecay: learning rates and weight decay of what is no classifier."""

import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

import mmvitzoo.engine.layer_decay  # noqa: F401  registers the constructor
from mmvitzoo.models import MPViT, PlainViT, SimpleFeaturePyramid


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Whatever the tests before have left."""
    init_default_scope('mmdet')


pytestmark = pytest.mark.stack

LR, WEIGHT_DECAY, RATE = 1e-3, 0.1, 0.7
VIT = dict(embed_dims=48, num_layers=4, num_heads=3, mlp_ratio=2)
MPVIT = dict(num_paths=(1, 2, 2, 2), num_layers=(1, 2, 1, 1), embed_dims=(16, 24, 32, 40), mlp_ratios=(2, 2, 2, 2))


class Detector(nn.Module):
    """Like every detector and segmentor, it has no depths itself."""

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
    """Of the decay rate, for 4 blocks."""
    if name.startswith('backbone.stem.'):
        return 5
    block = re.match(r'backbone\.blocks\.(\d)\.(?!residual)', name)
    return 4 - int(block[1]) if block else 0


def mpvit_exponent(name):
    """Of the decay rate, for 1, 2, 1 and 1 blocks in the stages."""
    if name.startswith('backbone.stem.'):
        return 6
    stage = re.match(r'backbone\.stages\.(\d)\.', name)
    if not stage:
        return 0
    last_of_stage_1 = re.search(r'\.1\.(paths\.\d\.blocks\.1|aggregate)\.', name)
    return {0: 5, 1: 3 if last_of_stage_1 else 4, 2: 2, 3: 1}[int(stage[1])]


def options(model, **paramwise_cfg):
    """Options of the optimizer by the names of the parameters."""
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
def test_learning_rates(build, exponent, deepest):
    model = build()
    groups = options(model, layer_decay_rate=RATE)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {exponent(name) for name in groups} == set(range(deepest + 1))
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * RATE ** exponent(name)), name
        assert group['weight_decay'] == WEIGHT_DECAY, name


def test_learning_rates_of_some_names():
    groups = options(vit(), layer_decay_rate=RATE)
    expected = {
        'backbone.stem.pos_embed': 5,
        'backbone.stem.projection.weight': 5,
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


def test_default_is_no_decay():
    assert {group['lr'] for group in options(vit(), norm_decay_mult=0.0).values()} == {LR}


@pytest.mark.parametrize('build', [vit, mpvit])
def test_weight_decay(build):
    model = build()
    groups = options(
        model, layer_decay_rate=RATE, norm_decay_mult=0.0, custom_keys=dict(pos_embed=dict(decay_mult=0.0))
    )
    modules = dict(model.named_modules())
    undecayed = {
        name
        for name in groups
        if name.endswith('pos_embed') or 'Norm' in type(modules[name.rpartition('.')[0]]).__name__
    }
    # LayerNorm2d and BatchNorm are norms, too.
    assert {'head.norm.bias', 'head.pos_embed', 'neck.fpn_convs.0.ln.weight', 'neck.rescale.0.1.bias'} < undecayed
    if build is vit:
        assert {'backbone.stem.pos_embed', 'backbone.blocks.3.residual.7.weight'} < undecayed
    else:
        assert 'backbone.stem.0.bn.weight' in undecayed
    for name, group in groups.items():
        assert group['weight_decay'] == (0 if name in undecayed else WEIGHT_DECAY), name


def test_frozen_parameters_are_left_out():
    model = vit(frozen_stages=2)
    groups = options(model, layer_decay_rate=RATE)
    assert groups.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    assert 'backbone.blocks.1.norm1.weight' not in groups
    assert groups['backbone.blocks.2.norm1.weight']['lr'] == pytest.approx(LR * RATE**2)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_found_from_every_toolbox(scope):
    with DefaultScope.overwrite_default_scope(scope):
        groups = options(vit(), layer_decay_rate=RATE)
    assert groups['backbone.stem.pos_embed']['lr'] == pytest.approx(LR * RATE**5)


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
    groups = options(model, layer_decay_rate=RATE)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {name for name in groups if name.startswith('bbox_head.')}
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * RATE ** vit_exponent(name)), name
