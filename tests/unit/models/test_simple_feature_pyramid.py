"""SimpleFeaturePyramid: shapes, channels, extra levels, memory format, argument checks."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmvitzoo.models import SimpleFeaturePyramid
from mmvitzoo.models.layers import LayerNorm2d

# Max pooling drops an odd last row; subsampling keeps it.
RESCALED = {4: lambda side: 4 * side, 2: lambda side: 2 * side, 1: lambda side: side, 0.5: lambda side: side // 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('size', [(2, 3), (5, 7), (8, 12)])
@pytest.mark.parametrize(
    'scale_factors, num_outs',
    [((4, 2, 1, 0.5), 5), ([4, 2, 1, 0.5], 4), ((2, 1), 4), ((4, 0.5), 2), ((4.0,), 1), ((1,), 3), ((0.5,), 2)],
)
def test_shapes(size, scale_factors, num_outs):
    neck = SimpleFeaturePyramid(16, 8, scale_factors=scale_factors, num_outs=num_outs)
    levels = neck((torch.randn(2, 16, *size),))
    expected = [tuple(RESCALED[factor](side) for side in size) for factor in scale_factors]
    while len(expected) < num_outs:
        expected.append(tuple(-(-side // 2) for side in expected[-1]))
    assert isinstance(levels, tuple)
    assert [tuple(x.shape) for x in levels] == [(2, 8, *side) for side in expected]


@pytest.mark.parametrize('size', [(4, 6), (7, 9)])
def test_extra_levels_subsample_the_previous_level(size):
    levels = SimpleFeaturePyramid(16, 8, scale_factors=(2, 1), num_outs=4)([torch.randn(2, 16, *size)])
    assert torch.equal(levels[2], levels[1][..., ::2, ::2])
    assert torch.equal(levels[3], levels[2][..., ::2, ::2])


@pytest.mark.parametrize('norm_cfg', [dict(type='LayerNorm2d', eps=1e-6), dict(type='BN')])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_levels_are_contiguous(norm_cfg, memory_format):
    """mmcv's RoIAlign reads memory as if it were contiguous and would return noise for channels-last maps."""
    neck = SimpleFeaturePyramid(16, 8, norm_cfg=norm_cfg)
    levels = neck([torch.randn(2, 16, 8, 12).to(memory_format=memory_format)])
    assert len(levels) == 5 and all(x.is_contiguous() for x in levels)


def test_only_last_map_is_used():
    neck = SimpleFeaturePyramid(16, 8)
    x = torch.randn(1, 16, 4, 6)
    for a, b in zip(neck((x,)), neck((torch.randn(1, 32, 16, 24), torch.randn(1, 16, 4, 6), x))):
        assert torch.equal(a, b)


@pytest.mark.parametrize('halve_channels, half, quarter', [(True, 32, 16), (False, 64, 64)])
def test_channels(halve_channels, half, quarter):
    neck = SimpleFeaturePyramid(64, 24, halve_channels=halve_channels)
    shapes = {name: tuple(value.shape) for name, value in neck.named_parameters()}
    rescale = {name: shape for name, shape in shapes.items() if name.startswith('rescale')}
    assert rescale == {
        'rescale.0.0.weight': (64, half, 2, 2),
        'rescale.0.0.bias': (half,),
        'rescale.0.1.weight': (half,),
        'rescale.0.1.bias': (half,),
        'rescale.0.3.weight': (half, quarter, 2, 2),
        'rescale.0.3.bias': (quarter,),
        'rescale.1.0.weight': (64, half, 2, 2),
        'rescale.1.0.bias': (half,),
    }
    laterals = [shapes[f'lateral_convs.{i}.conv.weight'] for i in range(4)]
    assert laterals == [(24, channels, 1, 1) for channels in (quarter, half, 64, 64)]
    assert [shapes[f'fpn_convs.{i}.conv.weight'] for i in range(4)] == [(24, 24, 3, 3)] * 4
    assert [tuple(x.shape[:2]) for x in neck([torch.randn(1, 64, 4, 4)])] == [(1, 24)] * 5


@pytest.mark.parametrize('norm_cfg, norm_type', [(None, LayerNorm2d), (dict(type='BN'), nn.BatchNorm2d)])
def test_convolutions_have_norm_and_no_activation(norm_cfg, norm_type):
    neck = SimpleFeaturePyramid(16, 8, **({} if norm_cfg is None else dict(norm_cfg=norm_cfg)))
    convs = [*neck.lateral_convs, *neck.fpn_convs]
    assert len(convs) == 8
    assert all(isinstance(conv.norm, norm_type) for conv in convs)
    assert all(not conv.with_activation and conv.conv.bias is None for conv in convs)
    # The norm between the transposed convolutions is always LayerNorm.
    assert isinstance(neck.rescale[0][1], LayerNorm2d)
    assert {m.eps for m in neck.modules() if isinstance(m, LayerNorm2d)} == {1e-6}


def test_gradients_reach_every_parameter():
    neck = SimpleFeaturePyramid(16, 8)
    x = torch.randn(2, 16, 4, 6, requires_grad=True)
    sum((out * torch.randn_like(out)).sum() for out in neck([x])).backward()
    for name, value in [('input', x), *neck.named_parameters()]:
        assert value.grad is not None and value.grad.abs().sum() > 0, name


@pytest.mark.parametrize('name', ['SimpleFeaturePyramid', 'mmvitzoo.SimpleFeaturePyramid'])
def test_build_from_registry(name):
    neck = MODELS.build(dict(type=name, in_channels=16, out_channels=8, num_outs=6))
    assert type(neck) is SimpleFeaturePyramid
    assert [x.shape[1] for x in neck([torch.randn(1, 16, 4, 4)])] == [8] * 6


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(scale_factors=()), r'scale_factors must be a descending subset of \(4, 2, 1, 0.5\), got \(\)'),
        (dict(scale_factors=(8, 4, 2)), r'scale_factors must be .*, got \(8, 4, 2\)'),
        (dict(scale_factors=(4, 2, 0.25)), r'scale_factors must be .*, got \(4, 2, 0.25\)'),
        (dict(scale_factors=(1, 2)), r'scale_factors must be a descending .*, got \(1, 2\)'),
        (dict(scale_factors=[2, 2, 1]), r'scale_factors must be .*, got \[2, 2, 1\]'),
        (dict(num_outs=3), 'num_outs must be at least 4, got 3'),
        (dict(scale_factors=(1,), num_outs=0), 'num_outs must be at least 1, got 0'),
        (dict(in_channels=[48, 48]), r'in_channels is a number: it reads the last map alone, got \[48, 48\]'),
        (dict(out_channels='8'), "out_channels is a number, got '8'"),
        (dict(norm_cfg='BN'), r"norm_cfg is a dict such as dict\(type='BN'\), or None, got 'BN'"),
    ],
)
def test_invalid_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f'^SimpleFeaturePyramid: {message}$'):
        SimpleFeaturePyramid(**dict(dict(in_channels=16, out_channels=8), **kwargs))
