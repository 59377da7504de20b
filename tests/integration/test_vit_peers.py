"""PlainViT against implementations of other libraries: equal maps with converted random weights."""

import pytest
import timm
import torch
from forms import build_converted

from mmvitzoo.checkpoints import convert, export

SIZES = [(224, 224), (240, 352)]


def randomize(model):
    """Sets random weights, also those that are initialized with zeros and ones."""
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if value.dim() > 1 and 'rel_pos' not in name and 'token' not in name and 'pos_embed' not in name:
            torch.nn.init.normal_(value, std=value[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(value, mean=float('norm' in name and 'weight' in name), std=0.2)
    model.eval()  # returns None in MMPretrain
    return model


def assert_equal(a, b):
    assert a.shape == b.shape
    assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize('size', SIZES)
def test_timm(size):
    """Compares the maps of four blocks, the class token and the logits."""
    peer = randomize(timm.create_model('vit_small_patch16_224', img_size=size))
    converted = convert(peer.state_dict())
    assert (converted.family, converted.source, converted.arch) == ('plainvit', 'timm', 'small')
    assert not converted.dropped
    blocks = (2, 5, 8, 11)
    # Positions do not tell the sides of a grid that is not square.
    kwargs = dict(img_size=size) if size[0] != size[1] else {}
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps = build_converted(converted, out_indices=blocks, **kwargs)(x)
        (token,) = build_converted(converted, out_type='cls_token', **kwargs)(x)
        for a, b in zip(maps, peer.forward_intermediates(x, indices=list(blocks), norm=False)[1][:3]):
            assert_equal(a, b)
        features = peer.forward_features(x)
        assert_equal(maps[3].flatten(2).transpose(1, 2), features[:, 1:])
        head = converted.state_dict['head.fc.weight'], converted.state_dict['head.fc.bias']
        assert_equal(torch.nn.functional.linear(token, *head), peer(x))


def test_distilled_deit():
    """The distillation token is dropped, with a reason; the maps equal those of the peer without it."""
    peer = randomize(timm.create_model('deit_tiny_distilled_patch16_224'))
    converted = convert(peer.state_dict())
    assert converted.arch == 'tiny'
    assert set(converted.dropped) == {'dist_token', 'head_dist.weight', 'head_dist.bias'}
    assert 'no distillation token' in converted.dropped['dist_token']
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = torch.cat([peer.cls_token, peer.patch_embed(x)], 1)
        tokens = tokens + peer.pos_embed[:, [0, *range(2, peer.pos_embed.shape[1])]]
        expected = peer.norm(peer.blocks(tokens))[:, 1:]
        assert_equal(build_converted(converted)(x)[0].flatten(2).transpose(1, 2), expected)


def test_timm_head_behind_fc_norm_is_dropped():
    """Stock classifiers have no norm between pooling and head, so the head would compute something else."""
    peer = timm.create_model('vit_tiny_patch16_224', global_pool='avg', fc_norm=True)
    converted = convert(peer.state_dict())
    assert not any(key.startswith('head.') for key in converted.state_dict)
    assert {'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'} <= converted.dropped.keys()


@pytest.mark.parametrize('size', SIZES)
def test_segment_anything(size):
    """The image encoder is ViTDet with relative positions."""
    options = dict(embed_dim=192, depth=12, num_heads=3, num_classes=0)
    peer = randomize(timm.create_model('samvit_base_patch16', img_size=size, **options))
    converted = convert(peer.state_dict())
    assert (converted.source, converted.arch) == ('timm-sam', 'tiny')
    assert converted.backbone_cfg['global_attn_indexes'] == (2, 5, 8, 11)
    assert all(key.startswith('neck.') for key in converted.dropped) and converted.dropped
    peer.neck = torch.nn.Identity()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert_equal(build_converted(converted)(x)[0], peer.forward_features(x))


@pytest.mark.stack
@pytest.mark.parametrize('size, final_norm', zip(SIZES, (False, True)))
def test_mmsegmentation(size, final_norm):
    """Exports to VisionTransformer and converts back."""
    from mmseg.models.backbones import VisionTransformer

    timm_model = randomize(timm.create_model('vit_tiny_patch16_224', num_classes=0))
    converted = convert(timm_model.state_dict())
    weights = export(converted.state_dict, 'plainvit', 'mmseg')
    if not final_norm:
        del weights['ln1.weight'], weights['ln1.bias']
    blocks = (2, 5, 8, 11)
    peer = VisionTransformer(
        embed_dims=192,
        num_layers=12,
        num_heads=3,
        out_indices=blocks,
        final_norm=final_norm,
        norm_cfg=dict(type='LN', eps=1e-6),
        patch_bias=True,
    )
    peer.eval()
    peer.load_state_dict(weights, strict=True)
    x = torch.randn(1, 3, *size)
    without = {key: value for key, value in weights.items() if key != 'patch_embed.projection.bias'}
    assert not convert(without).backbone['patch_embed.proj.bias'].any()  # MMSegmentation 1.2's default
    again = convert({f'backbone.{key}': value for key, value in peer.state_dict().items()})
    assert (again.source, again.backbone_cfg['final_norm']) == ('mmseg', final_norm)
    model = build_converted(again, out_indices=blocks)
    with torch.no_grad():
        for a, b in zip(model(x), peer(x)):
            assert_equal(a, b)


@pytest.mark.stack
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_mmpretrain(prefix):
    from mmpretrain.models.backbones import VisionTransformer

    peer = VisionTransformer('deit-tiny', img_size=(96, 128), out_type='featmap', out_indices=(5, 11))
    randomize(peer)
    converted = convert({prefix + key: value for key, value in peer.state_dict().items()})
    assert (converted.source, converted.arch) == ('mmpretrain', 'tiny')
    model = build_converted(converted, out_indices=(5, 11), img_size=(96, 128))
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        for a, b in zip(model(x), peer(x)):
            assert_equal(a, b)
    again = export(converted.state_dict, 'plainvit', 'mmpretrain')
    assert again.keys() == {f'backbone.{key}' for key in peer.state_dict()}
    assert all(torch.equal(value, again[f'backbone.{key}']) for key, value in peer.state_dict().items())
    # Weights of MMPretrain also load in timm.
    timm_model = timm.create_model('vit_tiny_patch16_224', img_size=(96, 128), num_classes=0).eval()
    timm_model.load_state_dict(export(converted.state_dict, 'plainvit', 'timm'), strict=True)
    with torch.no_grad():
        assert_equal(timm_model.forward_features(x)[:, 1:].transpose(1, 2), model(x)[1].flatten(2))
