"""MPViT: parity with the original implementation, details of the family, wrong arguments."""

import pytest
import torch
from forms import MPVIT, build_converted, slim
from references.mpvit import ReferenceMPViT
from torch import nn

from mmvitzoo.checkpoints import convert
from mmvitzoo.models import MPViT
from mmvitzoo.models.backbones.mpvit import FactorizedAttention

PARAMS = dict(tiny=5_843_736, xsmall=10_573_448, small=22_892_400, base=74_845_976)


@pytest.mark.stack
@pytest.mark.parametrize('arch', PARAMS)
def test_equals_original_implementation(arch, load_golden):
    reference = load_golden(f'mpvit_{arch}_official')
    converted = convert(reference.state_dict)
    assert converted.arch == arch
    model = build_converted(converted)
    with torch.no_grad():
        maps = model(reference.input)
        head = converted.state_dict['head.fc.weight'], converted.state_dict['head.fc.bias']
        outputs = dict(
            stem=model.stem(reference.input),
            logits=nn.functional.linear(maps[-1].mean((2, 3)), *head),
            **{f'stage{i}': x for i, x in enumerate(maps, 1)},
        )
    assert outputs.keys() == reference.case['outputs'].keys()
    for name, tensor in outputs.items():
        # Ten times tighter than required, so that a wrong eps or GELU fails.
        assert reference.error(name, tensor) < 1e-5, name
    assert sum(p.numel() for p in [*model.parameters(), *head]) == PARAMS[arch]


@pytest.mark.parametrize('size', [(64, 64), (80, 45)])
def test_equals_reference_implementation(size):
    torch.manual_seed(0)
    model = slim('mpvit').eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for a, b in zip(model(x), ReferenceMPViT(model).eval()(x)):
            assert (a - b).norm() < 1e-5 * b.norm()


def test_token_softmax_in_float16():
    """The weights of 36,863 tokens, 3e-8 each, would be rounded to 0 in float16, but their sum matters."""
    attention = FactorizedAttention(16)
    attention.qkv = attention.proj = nn.Identity()
    q, k, v = torch.ones(1, 192, 192, 16), torch.zeros(1, 192, 192, 16), torch.full((1, 192, 192, 16), 100.0)
    k[:, 0, 0], v[:, 0, 0] = 17.4, 0  # one token has nearly all of the weight, and a value of 0
    x = torch.cat([q, k, v], -1)
    expected = attention(x, torch.zeros_like)
    with torch.autocast('cpu', dtype=torch.float16):
        half = attention(x, torch.zeros_like).float()
    assert expected.min() > 0.1
    assert (half - expected).norm() < 2e-3 * expected.norm()


def test_norm_eps_is_that_of_the_original():
    model = slim('mpvit')
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    'norm_cfg, norm_type', [(dict(type='SyncBN'), nn.SyncBatchNorm), (dict(type='GN', num_groups=8), nn.GroupNorm)]
)
def test_norm_cfg(norm_cfg, norm_type):
    model = slim('mpvit', norm_cfg=norm_cfg).eval()
    norms = [m for m in model.modules() if 'Norm' in type(m).__name__ and not isinstance(m, nn.LayerNorm)]
    assert norms and all(isinstance(m, norm_type) for m in norms)
    model(torch.randn(1, 3, 64, 64))


def test_initialization():
    torch.manual_seed(0)
    model = MPViT('tiny')
    model.init_weights()
    weights = {name: value.std().item() for name, value in model.state_dict().items() if name.endswith('weight')}
    assert weights['stages.3.paths.0.blocks.0.attn.qkv.weight'] == pytest.approx(0.02, rel=0.05)
    # The variance is 2 / fan-out of one group.
    assert weights['stages.3.aggregate.conv.weight'] == pytest.approx((2 / 216) ** 0.5, rel=0.05)
    assert weights['stages.3.paths.0.cpe.weight'] == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert all(value.abs().max() == 0 for name, value in model.state_dict().items() if name.endswith('bias'))


def test_layer_depth():
    model = slim('mpvit')
    depth = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')[0] for name in model.state_dict()}
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)
    assert model.get_layer_depth('stem.0.conv.weight') == (0, 7)
    assert depth['stem.1.bn.weight'] == 0
    assert depth['stages.0.paths.1.blocks.0.attn.qkv.weight'] == depth['stages.0.local.1.bn.bias'] == 1
    assert depth['stages.1.patch_embeds.2.depthwise_conv.conv.weight'] == depth['stages.1.paths.0.cpe.weight'] == 2
    assert depth['stages.1.paths.2.blocks.1.mlp.fc1.bias'] == depth['stages.1.aggregate.conv.weight'] == 3
    assert depth['stages.3.aggregate.bn.weight'] == 5


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='huge'), "arch is one of tiny, xsmall, small, base, or a dict, got 'huge'"),
        (dict(arch=dict(embed_dims=(64, 64, 64, 64))), 'keys of an arch dict are num_paths, .* got embed_dims'),
        (dict(arch=dict(MPVIT, embed_dims=(16, 24, 32, 36))), r'embed_dims are multiples of 8, got \(16, 24, 32, 36\)'),
        (dict(arch=['tiny']), r"arch is one of .* got \['tiny'\]"),
        (dict(arch=dict(MPVIT, num_layers=(1, 2))), r'num_layers .* 4 stages, got \(1, 2\)'),
        (dict(arch=dict(MPVIT, num_layers=3)), 'num_layers .* 4 stages, got 3'),
        (dict(arch=dict(MPVIT, num_paths=(0, 1, 1, 1))), r'num_paths is a positive .* got \(0, 1, 1, 1\)'),
        (dict(arch=dict(MPVIT, embed_dims=(16.0, 24, 32, 40))), r'embed_dims is a positive .* got \(16.0, '),
        (dict(drop_path_rate='a'), "drop_path_rate is at least 0 and less than 1, got 'a'"),
        (dict(out_indices=(0, 4)), 'out_indices is an increasing sequence of numbers from 0 to 3, got .0, 4.'),
        (dict(out_indices=()), 'out_indices .* got ..$'),
        (dict(out_indices=(2, 1)), 'out_indices .* got .2, 1.'),
        (dict(frozen_stages=5), 'frozen_stages is a number from -1 to 4, got 5'),
        (dict(drop_path_rate=1.0), 'drop_path_rate is at least 0 and less than 1, got 1.0'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MPViT(**kwargs)
