"""ScalableViT: parity with the original implementation, padding, details of the family, wrong arguments."""

import pytest
import torch
from conftest import Golden
from forms import SCALABLE, build_converted, in_own_process, slim
from mmengine.registry import MODELS, init_default_scope
from references.scalablevit import ReferenceScalableViT
from torch import nn

from mmvitzoo.checkpoints import convert
from mmvitzoo.models import ScalableViT
from mmvitzoo.models.backbones.scalablevit import ScalableAttention, WindowAttention

PARAMS = dict(small=32_000_472, base=81_881_624, large=109_288_840)


@pytest.mark.stack
def test_small_equals_original_implementation(load_golden):
    check_original(load_golden('scalablevit_small_official'), 'small')


@pytest.mark.slow
def test_base_and_large_equal_original_implementation():
    """Each runs in a process of its own, since its weights are large."""
    for arch in ('base', 'large'):
        in_own_process(load_and_check_original, arch)


def load_and_check_original(arch):
    check_original(Golden(f'scalablevit_{arch}_official'), arch)


def check_original(reference, arch):
    """Checks the maps, and the logits of MMPretrain's head of several layers."""
    import mmpretrain.models  # noqa: F401  registers the head

    converted = convert(reference.state_dict)
    assert (converted.family, converted.source, converted.arch) == ('scalablevit', 'official', arch)
    model = build_converted(converted)
    init_default_scope('mmpretrain')
    cfg = dict(type='StackedLinearClsHead', num_classes=1000, in_channels=model.out_channels[3], mid_channels=[4096])
    head = MODELS.build(dict(cfg, norm_cfg=dict(type='LN', eps=1e-6), act_cfg=dict(type='GELU'))).eval()
    weights = {key[5:]: value for key, value in converted.state_dict.items() if key.startswith('head.')}
    head.load_state_dict(weights, strict=True)
    outputs = {}
    for stage, blocks in enumerate(model.stages, 1):  # maps before the output norms

        def store(_, __, x, stage=stage):
            outputs[f'stage{stage}'] = x.permute(0, 3, 1, 2)

        blocks[-1].register_forward_hook(store)
    with torch.no_grad():
        outputs['logits'] = head((model(reference.input)[0].mean((2, 3)),))
    assert outputs.keys() == reference.case['outputs'].keys()
    for name, tensor in outputs.items():
        assert reference.error(name, tensor) < 2e-6, name
    assert sum(p.numel() for p in [*model.parameters(), *head.parameters()]) == PARAMS[arch]


@pytest.mark.parametrize('size', [(64, 96), (197, 331), (32, 32)])
def test_equals_reference_implementation(size):
    """The reference implementation clips windows instead of masking padding."""
    model = slim('scalablevit').eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for a, b in zip(model(x), ReferenceScalableViT(model)(x)):
            assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize('size', [(5, 6), (7, 10), (13, 14), (7, 7)])
def test_windows_are_clipped_at_the_border(size):
    """A clipped window has the output of a map of its size."""
    torch.manual_seed(0)
    layer = WindowAttention(16, 2, 7).double().eval()
    nn.init.zeros_(layer.local_interaction.weight)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    whole = layer(x)
    for top in range(0, size[0], 7):
        for left in range(0, size[1], 7):
            window = (slice(None), slice(top, top + 7), slice(left, left + 7))
            torch.testing.assert_close(whole[window], layer(x[window]))


@pytest.mark.parametrize('size', [(197, 331), (32, 32), (800, 1333)])
def test_padding_of_the_image_changes_no_window_inside_it(size):
    """Compares an image alone with one in the corner of a larger canvas of zeros.

    The model has stage 0 without SSA, which would attend to the canvas. The last tokens of the image see the canvas
    through the convolutions of patch embedding, local interaction and positions.
    """
    torch.manual_seed(0)
    model = ScalableViT(dict(SCALABLE, num_layers=(1, 1, 1, 1)), out_indices=(0,)).eval()
    x = torch.randn(1, 3, *size)
    canvas = torch.zeros(1, 3, size[0] // 28 * 28 + 56, size[1] // 28 * 28 + 84)
    canvas[:, :, : size[0], : size[1]] = x
    with torch.no_grad():
        (alone,), (inside,) = model(x), model(canvas)
    # Windows that lie on the image, without the tokens that convolutions mix with the canvas.
    rows, cols = (side // 28 * 7 - 3 for side in size)
    assert alone.isfinite().all() and inside.isfinite().all()
    assert rows > 0 and cols > 0
    torch.testing.assert_close(alone[:, :, :rows, :cols], inside[:, :, :rows, :cols], atol=1e-5, rtol=1e-4)


def test_scalable_attention_pads_only_the_map_of_the_keys():
    """Zeros at the bottom and on the right complete the map that is reduced; queries are those of the map."""
    torch.manual_seed(0)
    layer = ScalableAttention(16, 2, 4, 1.5).eval()
    x = torch.randn(1, 6, 9, 16)
    padded = nn.functional.pad(x, (0, 0, 0, 3, 0, 2))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(padded)[:, :6, :9])
    assert layer.q.out_features == 24 and layer.v.out_features == 16


def test_windows_of_mostly_padding_are_finite_in_float16():
    """A map one token wider than a window has windows of one row, of one column and of one token."""
    model = slim('scalablevit').eval()
    x = torch.randn(1, 3, 32, 228)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.float16):
        maps = model(x)
    assert all(y.isfinite().all() for y in maps)
    layer = WindowAttention(16, 2, 7)
    with torch.autocast('cpu', dtype=torch.float16):
        y = layer(torch.randn(1, 8, 8, 16))
        y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_next_stage_reads_the_map_before_its_norm():
    model = slim('scalablevit').eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(x)
        for stage in (0, 1, 2):
            nn.init.constant_(getattr(model, f'norm{stage}').weight, 3.0)
        after = model(x)
    for stage in (0, 1, 2):
        torch.testing.assert_close(after[stage], 3 * before[stage])
    assert torch.equal(after[3], before[3])


def test_norm_eps_is_that_of_the_original():
    model = slim('scalablevit')
    reductions = [m.norm for m in model.modules() if isinstance(m, ScalableAttention) and m.spatial_ratio > 1]
    assert {m.eps for m in reductions} == {1e-5} and len(reductions) == 3
    others = [m for m in model.modules() if isinstance(m, nn.LayerNorm) and not any(m is r for r in reductions)]
    assert {m.eps for m in others} == {1e-6}


def test_initialization():
    torch.manual_seed(0)
    model = ScalableViT('small')
    model.init_weights()
    weights = {name: value.std().item() for name, value in model.state_dict().items() if name.endswith('weight')}
    assert weights['stages.3.0.attn.qkv.weight'] == pytest.approx(0.02, rel=0.05)
    assert weights['patch_embeds.3.proj.weight'] == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.05)
    assert weights['pos_embeds.3.weight'] == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert all(value.abs().max() == 0 for name, value in model.state_dict().items() if name.endswith('bias'))


def test_layer_depth():
    model = slim('scalablevit')
    depth = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')[0] for name in model.state_dict()}
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (9, 10)
    assert model.get_layer_depth('patch_embeds.0.norm.bias') == (0, 10)
    first_of_stage_1 = ('patch_embeds.1.proj.weight', 'stages.1.0.norm1.weight', 'pos_embeds.1.bias')
    assert all(depth[name] == 3 for name in first_of_stage_1)
    assert depth['stages.3.1.mlp.fc2.bias'] == 8 and depth['norm0.weight'] == 9


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='tiny'), "arch is one of small, base, large, or a dict, got 'tiny'"),
        (dict(arch=dict(embed_dims=64)), 'keys of an arch dict are embed_dims, .* got embed_dims'),
        (dict(arch=dict(SCALABLE, num_layers=(1, 2))), r'num_layers is a positive .* 4 stages, got \(1, 2\)'),
        (dict(arch=dict(SCALABLE, num_heads=(0, 2, 4, 4))), r'num_heads is a positive .* got \(0, 2, 4, 4\)'),
        (dict(arch=dict(SCALABLE, spatial_ratios=8)), 'spatial_ratios is a positive .* got 8'),
        (dict(arch=dict(SCALABLE, num_heads=(3, 2, 4, 4))), 'num_heads divides .* got 3, 16 and 20.0'),
        (dict(arch=dict(SCALABLE, channel_ratios=(1.1, 1, 1, 1))), 'num_heads divides .* got 2, 16 and 17.6'),
        (dict(window_size=0), 'window_size is an integer of at least 1, got 0'),
        (dict(out_indices=(0, 4)), 'out_indices is an increasing sequence of numbers from 0 to 3, got \\(0, 4\\)'),
        (dict(drop_path_rate=1.0), 'drop_path_rate is at least 0 and less than 1, got 1.0'),
        (dict(frozen_stages=5), 'frozen_stages is a number from -1 to 4, got 5'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f'ScalableViT: .*{message}'):
        ScalableViT(**{'arch': SCALABLE, **kwargs})
