"""MViTv2 against implementations of other libraries: equal maps with random weights, converted both ways."""

import pytest
import timm
import torch
from forms import build_converted

from mmvitzoo.checkpoints import CheckpointError, convert, export


def randomize(model):
    """Sets random weights, also those that are initialized with zeros and ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 and 'rel_pos' not in name:
                value.normal_(std=value[0].numel() ** -0.5)
            else:
                value.normal_(mean=float('norm' in name and 'weight' in name), std=0.2)
    model.eval()  # returns None in MMPretrain
    return model


def resize_rel_pos(peer, size):
    """Resizes the relative positions of a timm model for another image size; the original model does so itself."""
    grid = [-(-side // 4) for side in size]
    for attn in (block.attn for stage in peer.stages for block in stage.blocks):
        strides = attn.pool_q.stride[0], attn.pool_k.stride[0]
        for axis, side in zip('hw', grid):
            length = 2 * max(-(-side // stride) for stride in strides) - 1
            table = getattr(attn, f'rel_pos_{axis}').detach()
            table = torch.nn.functional.interpolate(table.T[None], length, mode='linear')[0].T
            setattr(attn, f'rel_pos_{axis}', torch.nn.Parameter(table))
        grid = [-(-side // strides[0]) for side in grid]


def assert_equal(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert (a - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize('size', [(224, 224), (250, 187)])
def test_timm(size):
    """At a size that 32 does not divide, tables are interpolated and indexed by fractional strides."""
    peer = randomize(timm.create_model('mvitv2_tiny'))
    converted = convert(peer.state_dict())
    assert (converted.family, converted.source, converted.arch) == ('mvitv2', 'timm', 'tiny')
    assert not converted.dropped
    again = export(converted.state_dict, 'mvitv2', 'timm')
    assert again.keys() == peer.state_dict().keys()
    assert all(torch.equal(value, again[key]) for key, value in peer.state_dict().items())
    resize_rel_pos(peer, size)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        (features,) = build_converted(converted)(x)
        tokens = peer.forward_features(x)
        head = converted.state_dict['head.fc.weight'], converted.state_dict['head.fc.bias']
        assert_equal(features.flatten(2).transpose(1, 2), tokens, 2e-6)
        assert_equal(torch.nn.functional.linear(features.mean((2, 3)), *head), peer(x), 2e-6)


@pytest.mark.stack
@pytest.mark.parametrize('in_mlp', [{}, dict(dim_mul_in_attention=False)], ids=['attention', 'mlp'])
def test_mmpretrain(in_mlp):
    """The channels of a stage are doubled in its first attention or in the MLP before it."""
    from mmpretrain.models.backbones import MViT

    peer = randomize(MViT('tiny', **in_mlp))
    weights = peer.state_dict()
    converted = convert(weights)
    assert (converted.source, converted.backbone_cfg) == ('mmpretrain', dict(type='MViTv2', arch='tiny', **in_mlp))
    again = export(converted.state_dict, 'mvitv2', 'mmpretrain')
    assert again.keys() == {f'backbone.{key}' for key in weights}
    assert all(torch.equal(value, again[f'backbone.{key}']) for key, value in weights.items())
    assert convert(again).backbone.keys() == converted.backbone.keys()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_equal(build_converted(converted)(x)[0], peer(x)[0])


@pytest.mark.stack
def test_mmpretrain_with_several_scales_is_refused():
    """Stages read normalized maps there, so the weights would fit but give other maps."""
    from mmpretrain.models.backbones import MViT

    with torch.device('meta'):
        weights = MViT('tiny', out_scales=(0, 1, 2, 3)).state_dict()
    with pytest.raises(CheckpointError, match='mvitv2/mmpretrain: norm0.weight .* read the normalized map'):
        convert(weights)


def test_class_token_is_refused():
    with torch.device('meta'):
        weights = timm.create_model('mvitv2_small_cls').state_dict()
    with pytest.raises(CheckpointError, match='mvitv2/timm: cls_token is a class token'):
        convert(weights)
