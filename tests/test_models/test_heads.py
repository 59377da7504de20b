"""NormRPNHead: against MMDetection's RPNHead, and against its layers written by hand."""

import pytest
import torch
import torch.nn.functional as F
from mmdet.models import RPNHead
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmvitzoo.models.heads import NormRPNHead


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Whatever the tests before have left."""
    init_default_scope('mmdet')


pytestmark = pytest.mark.stack

NORM = dict(type='LayerNorm2d', eps=1e-6)


def build(kind=NormRPNHead, **kwargs):
    torch.manual_seed(0)
    return kind(in_channels=8, feat_channels=12, **kwargs).double()


def maps():
    torch.manual_seed(1)
    return [torch.randn(2, 8, side, side + 1, dtype=torch.float64) for side in (8, 4)]


@pytest.mark.parametrize('num_convs', [1, 2])
def test_without_norm_is_mmdetection_s(num_convs):
    head, reference = build(num_convs=num_convs), build(RPNHead, num_convs=num_convs)
    for value in reference.parameters():
        nn.init.normal_(value)
    assert list(head.state_dict()) == list(reference.state_dict())
    head.load_state_dict(reference.state_dict(), strict=True)
    for levels, expected in zip(head(maps()), reference(maps())):
        assert len(levels) == 2 and all(torch.equal(a, b) for a, b in zip(levels, expected))


@pytest.mark.parametrize('num_convs', [1, 2, 3])
def test_a_norm_follows_every_hidden_convolution(num_convs):
    head = build(num_convs=num_convs, norm_cfg=NORM)
    hidden = [f'rpn_conv.{i}.{name}' for i in range(num_convs) for name in ('conv.weight', 'ln.weight', 'ln.bias')]
    outer = [f'{layer}.{name}' for layer in ('rpn_cls', 'rpn_reg') for name in ('weight', 'bias')]
    assert list(head.state_dict()) == hidden + outer
    for value in head.parameters():  # small weights let eps be seen, others scale and shift
        nn.init.normal_(value, std=0.01 if value.dim() == 4 else 1.0)
    weights = head.state_dict()
    cls_scores, bbox_preds = head(maps())
    for x, cls_score, bbox_pred in zip(maps(), cls_scores, bbox_preds):
        for i in range(num_convs):
            x = F.conv2d(x, weights[f'rpn_conv.{i}.conv.weight'], padding=1)
            centred = x - x.mean(1, keepdim=True)
            x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
            scale, shift = weights[f'rpn_conv.{i}.ln.weight'], weights[f'rpn_conv.{i}.ln.bias']
            x = (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
        for layer, seen in (('rpn_cls', cls_score), ('rpn_reg', bbox_pred)):
            torch.testing.assert_close(seen, F.conv2d(x, weights[f'{layer}.weight'], weights[f'{layer}.bias']))


@pytest.mark.parametrize(
    'norm_cfg, kind', [(dict(type='BN'), nn.BatchNorm2d), (dict(type='GN', num_groups=4), nn.GroupNorm)]
)
def test_other_norms(norm_cfg, kind):
    head = build(num_convs=2, norm_cfg=norm_cfg)
    norms = [layer.norm for layer in head.rpn_conv]
    assert len(norms) == 2 and all(isinstance(norm, kind) for norm in norms)
    head(maps())


def test_gradients_reach_every_parameter():
    head = build(num_convs=2, norm_cfg=NORM).train()
    sum((out * torch.randn_like(out)).sum() for levels in head(maps()) for out in levels).backward()
    for name, value in head.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name


def test_initialised_as_mmdetection_s():
    torch.manual_seed(0)
    head = NormRPNHead(in_channels=32, feat_channels=32, num_convs=2, norm_cfg=NORM)
    head.init_weights()
    for layer in head.rpn_conv:
        assert layer.conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert (layer.norm.weight == 1).all() and (layer.norm.bias == 0).all()


@pytest.mark.parametrize('name', ['NormRPNHead', 'mmvitzoo.NormRPNHead'])
def test_registered(name):
    head = MODELS.build(dict(type=name, in_channels=8, feat_channels=8, norm_cfg=NORM))
    assert type(head) is NormRPNHead and isinstance(head, RPNHead)
    assert head.rpn_conv[0].with_norm
