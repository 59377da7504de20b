"""MViTv2: parity with the original implementations, details of the family, wrong arguments."""

import pytest
import torch
from conftest import Golden
from forms import MVITV2, build_converted, in_own_process, slim
from references.mvitv2 import ReferenceMViTv2
from torch import nn

from mmvitzoo.checkpoints import convert
from mmvitzoo.models import MViTv2

PARAMS = dict(tiny=24_173_320, small=34_870_216, base=51_472_744, large=217_992_952)
ALL_STAGES = (0, 1, 2, 3)


@pytest.mark.stack
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_equals_original_implementation(arch, load_golden):
    check_original(load_golden(f'mvitv2_{arch}_official'), arch)


def check_original(reference, arch):
    converted = convert(reference.state_dict)
    assert (converted.source, converted.arch) == ('official', arch)
    model = build_converted(converted)
    outputs = {}
    for stage in ALL_STAGES:  # maps before the output norms

        def store(_, __, x, stage=stage):
            outputs[f'stage{stage + 1}'] = x.permute(0, 3, 1, 2)

        model.blocks[model.starts[stage + 1] - 1].register_forward_hook(store)
    head = converted.state_dict['head.fc.weight'], converted.state_dict['head.fc.bias']
    with torch.no_grad():
        outputs['logits'] = nn.functional.linear(model(reference.input)[0].mean((2, 3)), *head)
    check_outputs(outputs, reference)
    assert sum(p.numel() for p in [*model.parameters(), *head]) == PARAMS[arch]


@pytest.mark.stack
def test_equals_detectron2(load_golden):
    """Windows of 56 to 7 tokens, at image sizes that they do not divide."""
    check_detectron2(load_golden('mvitv2_tiny_d2'), 'tiny')


def check_detectron2(reference, arch):
    converted = convert(reference.state_dict)
    assert (converted.source, converted.arch) == ('detectron2', arch)
    model = build_converted(converted)
    with torch.no_grad():
        outputs = {f'scale{i}': x for i, x in enumerate(model(reference.input), 2)}
    check_outputs(outputs, reference)


def check_large(source):
    reference = Golden(f'mvitv2_large_{source}')
    (check_original if source == 'official' else check_detectron2)(reference, 'large')


@pytest.mark.slow
@pytest.mark.parametrize('source', ['official', 'd2'])
def test_large_equals_original_implementations(source):
    """Runs in a process of its own, since the weights have 0.9 GB."""
    in_own_process(check_large, source)


def check_outputs(outputs, reference):
    assert outputs.keys() == reference.case['outputs'].keys()
    for name, tensor in outputs.items():
        # Ten times tighter than required, so that a wrong eps or GELU fails.
        assert reference.error(name, tensor) < 1e-5, name


@pytest.mark.parametrize(
    'arch, kwargs, params',
    [
        *((arch, dict(dim_mul_in_attention=arch != 'large'), count) for arch, count in PARAMS.items()),
        ('huge', {}, 667_000_000),  # published in millions
    ],
)
def test_number_of_parameters(arch, kwargs, params):
    with torch.device('meta'):
        model = MViTv2(arch, **kwargs)
    count = sum(p.numel() for p in model.parameters()) + 1000 * (model.out_channels[3] + 1)
    assert count == params or (arch == 'huge' and round(count, -6) == params)


@pytest.mark.parametrize('form', ['mvitv2', 'mvitv2_windows', 'mvitv2_mlp'])
@pytest.mark.parametrize('size', [(64, 96), (150, 333)])
def test_equals_reference_implementation(form, size):
    model = slim(form).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for a, b in zip(model(x), ReferenceMViTv2(model)(x)):
            assert (a - b).norm() < 1e-5 * b.norm()


def test_next_stage_reads_the_map_before_its_norm():
    """A change of the norms of the first three maps changes these maps and no other."""
    model = slim('mvitv2_windows').eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(x)
        for stage in (0, 1, 2):
            norm = getattr(model, f'norm{stage}')
            nn.init.constant_(norm.weight, 3.0)
            nn.init.constant_(norm.bias, 1.0)
        after = model(x)
    for stage in (0, 1, 2):
        torch.testing.assert_close(after[stage], 3 * before[stage] + 1)
    assert torch.equal(after[3], before[3])


def test_detection_form_has_the_weights_of_the_classification_form():
    """The maps differ, except that of stage 0 in an image of one window."""
    whole, windows = slim('mvitv2'), slim('mvitv2_windows')
    windows.load_state_dict(whole.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        a, b = whole.eval()(x), windows.eval()(x)
    # 56 x 56 tokens are one window of stage 0, which differs in nothing else.
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(a[1], b[1], atol=1e-2)


def windows_and_strides(model):
    """Returns (window size, stride of queries, stride of keys) of each block."""
    return [(block.attn.window_size, block.stride, block.attn.pool_k.stride[0]) for block in model.blocks]


def test_windows_and_strides_are_those_of_detectron2():
    model = MViTv2('tiny', window_attention=True)
    assert windows_and_strides(model) == [
        (56, 1, 4),
        *((56, 2, 2), (0, 1, 4)),
        *((28, 2, 1), (14, 1, 1), (14, 1, 1), (14, 1, 1), (0, 1, 2)),
        *((14, 2, 1), (0, 1, 1)),
    ]
    expected = [(0, 1, 4), (0, 2, 2), (0, 1, 2), (0, 2, 1), *4 * [(0, 1, 1)], (0, 2, 1), (0, 1, 1)]
    assert windows_and_strides(MViTv2('tiny')) == expected


def test_attention_stays_in_its_window():
    """Without convolutions across windows, a window of an image has the output that it has alone."""
    model = slim('mvitv2_windows', out_indices=(0,)).eval()
    model.patch_embed.proj = nn.Conv2d(3, 16, 4, 4)
    with torch.no_grad():
        for name in 'qkv':
            weight = getattr(model.blocks[0].attn, f'pool_{name}').weight
            weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # all but the center
        x = torch.randn(1, 3, 448, 448)
        (whole,) = model(x)
        (window,) = model(x[:, :, 224:, :224])
    torch.testing.assert_close(whole[:, :, 56:, :56], window, atol=1e-5, rtol=1e-4)


def test_relative_positions_are_interpolated():
    """An image of half the size uses tables of half the length."""
    model = slim('mvitv2').eval()
    half = slim('mvitv2', img_size=112).eval()
    half.load_state_dict(model.state_dict(), strict=True)  # resized while loading
    assert len(half.blocks[0].attn.rel_pos_h) == 55 and len(model.blocks[0].attn.rel_pos_h) == 111
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        for a, b in zip(model(x), half(x)):
            torch.testing.assert_close(a, b)


def test_norm_eps_is_that_of_the_original():
    assert {m.eps for m in slim('mvitv2_windows').modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_initialization():
    torch.manual_seed(0)
    model = MViTv2('tiny')
    model.init_weights()
    weights = model.state_dict()
    for name in ('qkv.weight', 'rel_pos_h', 'rel_pos_w'):
        assert weights[f'blocks.9.attn.{name}'].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights['blocks.9.mlp.fc1.bias'].abs().max() == 0
    assert all(weights[f'blocks.1.attn.norm_{name}.weight'].eq(1).all() for name in 'qkv')


def test_layer_depth():
    model = slim('mvitv2')
    depth = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')[0] for name in model.state_dict()}
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (7, 8)
    assert model.get_layer_depth('patch_embed.proj.weight') == (0, 8)
    assert depth['blocks.0.attn.rel_pos_h'] == 1 and depth['blocks.5.shortcut_proj.bias'] == 6
    assert depth['norm0.weight'] == depth['norm3.bias'] == 7


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='giant'), "arch is one of tiny, small, base, large, huge, or a dict, got 'giant'"),
        (dict(arch=dict(embed_dims=64)), 'keys of an arch dict are embed_dims, .* got embed_dims'),
        (dict(arch=dict(MVITV2, embed_dims=17)), 'embed_dims is a multiple of num_heads, got 17 and 2'),
        (dict(arch=dict(MVITV2, num_layers=0)), 'num_layers is an integer of at least 1, got 0'),
        (dict(arch=dict(MVITV2, num_heads='1')), "num_heads is an integer of at least 1, got '1'"),
        (
            dict(arch=dict(MVITV2, downscale_indices=(1, 3))),
            r'downscale_indices .* 3 numbers .* got \(1, 3\)',
        ),
        (dict(arch=dict(MVITV2, downscale_indices=(0, 1, 3))), r'3 numbers from 1 to 5, got \(0, 1, 3\)'),
        (dict(arch=dict(MVITV2, downscale_indices=(1, 3, 6))), r'3 numbers from 1 to 5, got \(1, 3, 6\)'),
        (dict(arch=dict(MVITV2, downscale_indices=(3, 1, 4))), r'3 numbers .* got \(3, 1, 4\)'),
        (dict(arch=dict(MVITV2, downscale_indices=3)), '3 numbers .* got 3'),
        (dict(img_size=(224,)), r'img_size is a number of pixels, at least 32, or \(H, W\), got \(224,\)'),
        (dict(img_size=16), 'img_size is .* got 16'),
        (dict(img_size='224'), "img_size is .* got '224'"),
        (dict(out_indices=(0, 4)), 'out_indices is an increasing sequence of numbers from 0 to 3, got \\(0, 4\\)'),
        (dict(drop_path_rate=1.0), 'drop_path_rate is at least 0 and less than 1, got 1.0'),
        (dict(frozen_stages=5), 'frozen_stages is a number from -1 to 4, got 5'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f'MViTv2: .*{message}'):
        MViTv2(**{'arch': MVITV2, **kwargs})
