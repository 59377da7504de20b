"""Pictures of backbones and the commands that draw them, and FLOPs by operator."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from forms import FORMS, VIT_ARCH, VITDET, slim
from sklearn.decomposition import PCA
from torch import nn

from mmvitzoo.analysis import (
    attention_maps,
    class_activations,
    draw_attention,
    feature_maps,
    normalize,
    receptive_fields,
)
from mmvitzoo.analysis.command import read_resized
from mmvitzoo.analysis.cost import count_flops
from mmvitzoo.analysis.features import pca_colors
from mmvitzoo.analysis.grid import Grid
from mmvitzoo.analysis.receptive_field import ReceptiveField
from mmvitzoo.inference import load_model
from mmvitzoo.models import MPViT, PlainViT
from mmvitzoo.models.backbones.base import Backbone
from mmvitzoo.models.backbones.mpvit import FactorizedAttention
from mmvitzoo.models.backbones.mvitv2 import PoolingAttention
from mmvitzoo.models.backbones.scalablevit import ScalableAttention, WindowAttention
from mmvitzoo.models.layers import pad_to_multiple

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'docs' / 'seeing_inside.md').read_text()
COMMANDS = [x for x in re.sub(r'\\\n', '', PAGE).splitlines() if x.startswith('python tools/visualization/')]
SIZE = (72, 104)  # windows divide no side of a map
PHOTO = 'data/mini/val/000001.jpg'
PLAIN = 'configs/vitdet/mask-rcnn_plainvit-mini_mini-coco.py'
every_form = pytest.mark.parametrize('form', FORMS)


def random_image(size=SIZE):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


# --- attention


@every_form
@pytest.mark.parametrize('point', [(0, 0), (51, 40), (103, 71)])
def test_weights_reproduce_the_output_of_attention(form, point):
    # The value outside the map is that of one prefix token.
    model = slim(form, **(dict(num_register_tokens=0) if form == 'dinov3' else {})).eval()
    layers = model.attention_layers()
    inputs = {}
    for layer in layers:
        for module in (layer.attn, layer.attn.proj):
            module.register_forward_pre_hook(lambda module, args: inputs.update({module: args}))
    maps = attention_maps(model, random_image(), point, range(layers[-1].block + 1))
    assert len(maps) == len(layers)
    with torch.no_grad():
        model(random_image())
        for layer, x in zip(layers, maps):
            (result,) = inputs[layer.attn.proj]
            if layer.num_prefix_tokens:
                result = result[:, 1:].unflatten(1, (5, 7))
            values, outside_value, addition = values_of(layer.attn, *inputs[layer.attn])
            num_heads = len(x.weights)
            mixed = torch.einsum('nhw,hwnc->nc', x.weights, values.unflatten(-1, (num_heads, -1)))
            mixed = (mixed + x.outside_weight[:, None] * outside_value.view(num_heads, -1)).flatten()
            assert torch.allclose(mixed, result[(0, *x.query)] - addition[x.query], atol=1e-5)
            if isinstance(layer.attn, FactorizedAttention):
                continue
            assert x.weights.min() >= 0
            assert torch.allclose(x.weights.sum((1, 2)) + x.outside_weight, torch.ones(num_heads))
            side = layer.window_size // layer.q_stride
            is_padded = side and any((i // side + 1) * side > n for i, n in zip(x.query, result.shape[1:3]))
            has_outside = layer.num_prefix_tokens or (is_padded and not isinstance(layer.attn, WindowAttention))
            assert (x.outside_weight > 0).tolist() == [bool(has_outside)] * num_heads


def values_of(attn, x, crpe=None):
    """Values (H, W, C), the value outside the map (C,), and the addition to the output of attention (H, W, C)."""
    zeros = torch.zeros(attn.proj.in_features)
    if isinstance(attn, PoolingAttention):
        q, _, v = (rearrange(y, 'heads h w c -> h w (heads c)') for y in attn.pooled_qkv(x))
        return v, zeros, q
    if isinstance(attn, ScalableAttention):
        if attn.spatial_ratio == 1:
            return attn.kv(x).chunk(2, -1)[1][0], zeros, zeros.expand(*x.shape[1:])
        y = pad_to_multiple(x, attn.spatial_ratio).permute(0, 3, 1, 2)
        y = F.gelu(attn.norm(attn.reduction(y).permute(0, 2, 3, 1)))
        return attn.v(y)[0], zeros, zeros.expand(*x.shape[1:])
    q, _, v = attn.qkv(x).chunk(3, -1)
    if isinstance(attn, FactorizedAttention):
        return v[0], zeros, (q * crpe(v))[0]
    if isinstance(attn, WindowAttention):
        return v[0], zeros, attn.local_interaction(v)[0]
    if x.dim() == 3:  # the class token comes first
        return v[0, 1:].unflatten(0, (5, 7)), v[0, 0], zeros.expand(5, 7, -1)
    return v[0], attn.qkv.bias.chunk(3)[2], zeros.expand_as(v[0])


@pytest.mark.parametrize('form, window', [('vitdet_conv', (48, 48, 96, 96)), ('scalablevit', (54, 54, 82, 82))])
def test_weights_are_zero_outside_the_window(form, window):
    x, *_ = attention_maps(slim(form).eval(), random_image((128, 160)), (70, 75), [0])
    rows, cols = (x.key_grid.nearest(side, axis) for axis, side in enumerate((128, 160)))
    ys, xs = (x.weights.mean(0)[rows][:, cols] > 0).nonzero().T
    assert x.window == window == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_query_is_the_token_nearest_to_the_point():
    """Patches of plain backbones lie side by side; those of pyramids are centered on multiples of the stride."""
    plain, pyramid = slim('vitdet').eval(), slim('mpvit').eval()
    for x, token, block in ((15, 0, 3), (16, 1, 3), (31, 1, 3), (32, 2, 3)):
        assert attention_maps(plain, random_image(), (x, 71), [block])[0].query == (4, token)
    for x, token in ((15, 0), (16, 1), (47, 1), (48, 2), (103, 3)):
        assert attention_maps(pyramid, random_image(), (x, 71), [4])[0].query == (2, token)


@pytest.mark.parametrize(
    'form, blocks',
    [
        ('vit', '0 global, 1 global, 2 global, 3 global'),
        ('vitdet', '0 window, 1 global, 2 window, 3 global'),
        ('mvitv2_windows', '0 window, 1 window, 2 global, 3 window, 4 global, 5 global'),
        ('scalablevit', ', '.join(f'{i} {("window", "scalable")[i % 2]}' for i in range(8))),
        (
            'mpvit',
            ', '.join(f'{i} path {k} x {k}' for i in (0, 2, 3, 4) for k in (3, 5, 7)).replace('0 path 7 x 7, ', ''),
        ),
    ],
)
def test_default_blocks_cover_stages_and_attention_types(form, blocks):
    maps = attention_maps(slim(form).eval(), random_image(), (9, 9))
    assert ', '.join(f'{x.block} {x.attn_type}' for x in maps) == blocks


def test_figure_labels_show_the_weights_of_the_head():
    model = slim('vitdet').eval()
    image = np.zeros((*SIZE, 3), np.uint8)
    maps = attention_maps(model, random_image(), (100, 70), [0])
    for head in (None, 2):
        weights, outside = (x.mean(0) if head is None else x[head] for x in (maps[0].weights, maps[0].outside_weight))
        _, axis = draw_attention(image, maps, (100, 70), head).axes
        assert axis.get_title() == 'block 0: window, stride 16'
        assert axis.get_xlabel() == f'keys of stride 16\nup to {weights.max():.2g}, {outside:.1%} outside the map'
    with pytest.raises(ValueError, match='the heads of block 0 are from 0 to 2, got 3'):
        draw_attention(image, maps, (100, 70), 3)


def test_backbone_without_attention_layers_is_refused():
    class Other(Backbone):
        arch_zoo = {'tiny': dict(embed_dims=8, num_layers=1)}

    with pytest.raises(ValueError, match='^attention of Other cannot be analyzed$'):
        attention_maps(Other('tiny', 4, (3,), 0.0, -1), random_image(), (0, 0))


def test_reduced_keys_cover_their_patches_of_queries():
    for x in attention_maps(slim('scalablevit').eval(), random_image(), (9, 9), [1, 3, 5]):
        ratio = x.key_grid.stride // x.query_grid.stride
        assert ratio > 1 and torch.equal(x.key_grid.nearest(104, 1), x.query_grid.nearest(104, 1) // ratio)


@pytest.mark.parametrize('kwargs, window', [({}, (0, 0, 104, 72)), (VITDET, (72, 24, 104, 48))])
def test_patches_that_are_not_square(kwargs, window):
    """Cells of 8 x 24 pixels: the maps have 9 x 5 tokens, and windows of 3 x 3 tokens 24 x 72 pixels."""
    model = PlainViT(VIT_ARCH, patch_size=(8, 24), img_size=(72, 120), **kwargs).eval()
    x, *_ = maps = attention_maps(model, random_image(), (80, 40), [0])
    assert x.query == (5, 3) and x.weights.shape == (3, 9, 5) and x.window == window
    rows, cols = x.weights.sum(0).nonzero().T
    assert (cols.min() * 24, rows.min() * 8, cols.max() * 24 + 8, rows.max() * 8 + 8) == window
    figure = draw_attention(np.zeros((*SIZE, 3), np.uint8), maps, (80, 40))
    assert figure.axes[1].get_title().endswith('stride 8 x 24')
    (field,) = receptive_fields(model, random_image())
    assert field.center == (60, 36) and feature_maps(model, random_image())[0].rgb.shape == (9, 5, 3)


# --- features


def test_colors_are_principal_components():
    x = torch.randn(20, 9, 13, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 21)[:, None, None]
    explained_variance, rgb = pca_colors(x)
    tokens = x.flatten(1).T.numpy()
    pca = PCA(3, svd_solver='full').fit(tokens)
    projected = pca.transform(tokens)
    low, high = np.quantile(projected, (0.02, 0.98), axis=0)
    assert explained_variance == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-4)
    assert np.allclose(rgb.reshape(-1, 3), ((projected - low) / (high - low)).clip(0, 1), atol=1e-3)


@every_form
def test_feature_maps_of_all_families(form):
    maps = feature_maps(nn.ModuleDict(dict(backbone=slim(form).eval())), random_image())
    assert tuple(x.grid.stride for x in maps) == FORMS[form].strides
    assert tuple(x.channels for x in maps) == FORMS[form].channels
    for x in maps:
        assert x.rgb.shape == (*x.grid.size(SIZE), 3) and x.rgb.min() == 0 and x.rgb.max() == 1
        assert 0.1 < x.explained_variance <= 1.001


def test_map_of_one_token_has_finite_colors():
    last = feature_maps(slim('mpvit').eval(), random_image((32, 32)))[-1]
    assert last.rgb.shape == (1, 1, 3) and np.isfinite(last.rgb).all() and last.explained_variance == 0


def test_class_token_classifier_has_maps():
    pairs = PlainViT(VIT_ARCH, img_size=64, output_cls_token=True).eval()
    assert feature_maps(pairs, random_image())[0].rgb.shape == (5, 7, 3) and len(pairs(random_image())[0]) == 2
    model = PlainViT('tiny', img_size=64, out_type='cls_token').eval()
    assert feature_maps(model, random_image())[0].rgb.shape == (5, 7, 3)
    assert receptive_fields(model, random_image())[0].field.shape == SIZE
    assert model(random_image())[0].shape == (1, 192)


# --- class activation


class Classifier(nn.Module):
    """Model with the interface of MMPretrain's classifiers, whose head takes the mean of a map or the class token."""

    cfg = SimpleNamespace(default_scope='mmpretrain')

    def __init__(self, backbone, channels):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(channels, 3)

    def extract_feat(self, x):
        out = self.backbone(x)[-1]
        return out if out.ndim == 2 else out.mean((2, 3))


def test_class_activation_of_averaged_tokens():
    """The map is that of the last norm."""
    backbone = slim('vit', out_indices=None, out_type='avg_featmap').eval()
    model = Classifier(backbone, backbone.embed_dims).eval()
    outputs = []
    backbone.norm.register_forward_hook(lambda module, args, out: outputs.append(out))
    category, _, (activation,) = class_activations(model, random_image())
    outputs.clear()
    logits = model.head(model.extract_feat(random_image()))[0]
    (grad,) = torch.autograd.grad(logits[category], outputs)
    expected = (outputs[0] * grad)[0, backbone.num_prefix_tokens :].sum(-1).relu()
    np.testing.assert_allclose(activation.weights.flatten(), expected.detach().numpy().flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('form', ['vitdet', 'dinov2', 'mpvit', 'mvitv2_windows', 'scalablevit'])
def test_class_activation_is_the_product_with_the_gradient(form):
    """The head averages the last map, so that the gradient of a class is its row of weights at every token."""
    backbone = slim(form).eval()
    model = Classifier(backbone, backbone.out_channels[backbone.out_indices[-1]]).eval()
    category, score, (*_, activation) = class_activations(model, random_image())
    with torch.no_grad():
        feature_map = backbone(random_image())[-1][0]
        logits = model.head(feature_map.mean((1, 2)))
        weights = model.head.weight[category] / feature_map[0].numel()
        expected = torch.einsum('c,chw->hw', weights, feature_map).relu()
    assert category == logits.argmax() and score == pytest.approx(logits.max().item(), rel=1e-5)
    np.testing.assert_allclose(activation.weights, expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('form', ['vit', 'dinov3'])
def test_class_activation_of_a_class_token(form):
    """The map holds the tokens that enter the last attention, without prefix tokens."""
    backbone = slim(form, out_indices=None, out_type='cls_token', with_cls_token=True).eval()
    model = Classifier(backbone, backbone.embed_dims).eval()
    category, _, (activation,) = class_activations(model, random_image(), 1)
    norm, tokens = backbone.blocks[-1].norm1, []
    assert not norm._forward_hooks
    norm.register_forward_hook(lambda module, args, out: tokens.append(out.detach().requires_grad_()) or tokens[0])
    model.head(model.extract_feat(random_image()))[0, 1].backward()
    size = tuple(-(-side // backbone.strides[0]) for side in SIZE)
    maps = (y[0, backbone.num_prefix_tokens :].unflatten(0, size) for y in (tokens[0].detach(), tokens[0].grad))
    feature_map, grad = maps
    expected = (feature_map * grad).sum(-1).relu()
    assert (category, activation.weights.shape) == (1, size)
    np.testing.assert_allclose(activation.weights, expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.stack
@pytest.mark.parametrize(
    'name, num_maps',
    [
        ('plainvit-mini_mini-classes', 1),
        ('scalablevit-mini_fpn_mini-coco', 4),
        ('retinanet_scalablevit-mini_fpn_mini-coco', 3),
        ('mask-rcnn_plainvit-mini_mini-coco', 1),
    ],
)
def test_class_activation_of_models_in_the_zoo(name, num_maps):
    torch.manual_seed(0)
    model = load_model(name)
    if hasattr(model, 'roi_head'):
        model.roi_head.test_cfg.score_thr = 0
    category, score, activations = class_activations(model, random_image((96, 128)))
    assert len(activations) == num_maps and max(x.weights.max() for x in activations) > 0
    assert np.isfinite(score) and category >= 0


def test_class_activation_refuses_classes_without_score():
    model = load_model('mask-rcnn_plainvit-mini_mini-coco')
    model.roi_head.test_cfg.score_thr = 1
    with pytest.raises(ValueError, match='^no object is detected$'):
        class_activations(model, random_image((96, 128)))
    with pytest.raises(ValueError, match='^classes are from 0 to 9, got 10$'):
        class_activations(load_model('plainvit-mini_mini-classes'), random_image(), 10)


# --- receptive fields


def test_receptive_field_of_window_attention_is_the_window():
    torch.manual_seed(0)
    arch = dict(embed_dims=48, num_layers=3, num_heads=3, mlp_ratio=2)
    model = PlainViT(arch, img_size=144, with_cls_token=False, window_size=3, with_cp=True).eval()
    model.init_weights()
    (x,) = receptive_fields(model, torch.cat([random_image((144, 144))] * 2))
    window = x.field[48:96, 48:96]
    assert x.center == (72, 72) and window.min() > 0 and window.sum() == pytest.approx(1)
    assert x.side(1) == 48 and x.side(0.5) < 48
    # The final norm does not hide that the token depends most on its own patch.
    assert x.field[64:80, 64:80].mean() > 2 * window.mean()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('form', ['mpvit', 'mvitv2', 'scalablevit', 'vitae_s'])
def test_receptive_fields_are_centered_on_their_tokens(form):
    """New models hardly prefer a direction."""
    for field in receptive_fields(slim(form).eval(), random_image((224, 224)))[:2]:
        near = field.field > field.field.max() / 20
        y, x = near.nonzero().double().mean(0).tolist()
        assert field.center == pytest.approx((x + 0.5, y + 0.5), abs=field.grid.stride / 4)


def test_side_of_a_uniform_field():
    field = torch.full((20, 20), 1 / 400)
    assert ReceptiveField('', Grid(2, 0), (10, 10), field).side(0.5) == 16  # 14 * 14 is less than half of 400
    assert ReceptiveField('', Grid(2, 0), (10.5, 10.5), field).side(0.5) == 15
    assert ReceptiveField('', Grid(2, 0), (10, 10), field).side(0.95) == 20
    assert ReceptiveField('', Grid(2, 0), (0, 0), field).side(1) == 40


# --- cost


def test_flops_of_each_operator_are_counted():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Upsample(scale_factor=2)
    )
    layers.extend([nn.Upsample(scale_factor=2, mode='bilinear'), nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(1)])
    flops = count_flops(layers.eval(), torch.empty(1, 3, 8, 8))
    assert flops.pop(torch.ops.aten.convolution) == 64 * 3 * 9 * 4
    assert sorted(flops.values()) == sorted([2 * 256, 5 * 256, 1024, 4 * 4096, 4096, 16])


def test_count_flops_leaves_the_model_unchanged():
    model = slim('vitdet').eval()
    model.patch_embed.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        before = model(random_image())
        flops = count_flops(model, random_image())
        after = model(random_image())
    assert sum(flops.values()) > 1e6 and all(torch.equal(x, y) for x, y in zip(before, after))
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert model.blocks[0].attn.rel_pos_kernel is None
    assert torch.backends.mha.get_fastpath_enabled()


# --- images and commands


@pytest.mark.parametrize(
    'key, channels', [('bgr_to_rgb', (0, 1, 2)), ('to_rgb', (0, 1, 2)), (None, (2, 1, 0))], ids=str
)
def test_normalize_follows_the_data_preprocessor(workspace, key, channels):
    image = read_resized(workspace / PHOTO, (40, 56))
    assert image.shape == (40, 56, 3) and image[..., 0].mean() > image[..., 2].mean()  # an orange suit
    x = normalize(image, dict(mean=[1, 2, 3], std=[4, 5, 6], **({key: True} if key else {})))
    for i, channel in enumerate(channels):
        assert torch.allclose(x[0, i], (torch.from_numpy(image[..., channel]).float() - (i + 1)) / (i + 4))


def test_normalize_refuses_models_of_other_channels():
    with pytest.raises(ValueError, match='only models for images of 3 channels are supported, .* has 4'):
        normalize(np.zeros((8, 8, 3), np.uint8), dict(mean=[1] * 4, std=[2] * 4))


@pytest.fixture
def command(workspace, monkeypatch):
    """Returns a function that runs a Python command line in this process, in the workspace."""

    def command(line):
        monkeypatch.chdir(workspace)
        monkeypatch.setattr(sys, 'argv', shlex.split(line)[1:])
        runpy.run_path(sys.argv[0], run_name='__main__')

    return command


@pytest.mark.parametrize(
    'line',
    [
        pytest.param(
            line,
            id=re.search('docs/_static/(.*).png', line)[1],
            marks=[pytest.mark.slow] if '/attention.py' in line and PLAIN not in line else [],
        )
        for line in COMMANDS
    ],
)
def test_commands_of_the_page_write_pictures(command, workspace, capsys, line):
    """The weights are random, since the trainings take minutes."""
    for folder in re.findall(r'--checkpoint work_dirs/([^/]+)/', line):
        assert f'/{folder}.py ' in line  # the folder of a training has the name of the config
    line = re.sub(r'--checkpoint \S+ ', '', line).replace('docs/_static/', 'out/pictures/')
    command(line)
    assert 'no checkpoint: the weights are random\nwritten  out/pictures/' in capsys.readouterr().out
    picture = plt.imread(workspace / re.search(r'out/\S+', line)[0])
    assert picture.shape[1] == 1200 and picture[..., :3].std() > 0.05


def test_page_has_a_command_for_each_picture():
    pictures = set(re.findall(r'\]\(_static/(.*?)\)', PAGE))
    assert len(pictures) == 7 and pictures == {re.search(r'docs/_static/(\S+)', line)[1] for line in COMMANDS}


def test_command_reads_checkpoint_and_images(command, workspace, capsys):
    torch.manual_seed(0)
    model = MPViT('tiny').eval()
    arguments = 'configs/mpvit/mpvit-tiny_8xb128_in1k.py --size 64 96 --out out/field.svg'
    torch.save({'model': model.state_dict()}, workspace / 'backbone_only.pth')
    with pytest.raises(SystemExit):
        command(f'python tools/visualization/receptive_field.py {arguments} --checkpoint backbone_only.pth')
    assert 'backbone_only.pth: ' in capsys.readouterr().err and not (workspace / 'out' / 'field.svg').exists()
    command(f'python tools/visualization/receptive_field.py {arguments} --images {PHOTO} data/mini/val/000002.jpg')
    assert (workspace / 'out' / 'field.svg').read_text().count('<svg') == 1


@pytest.mark.parametrize(
    'arguments, message',
    [
        (f'{PLAIN} nowhere.jpg --point 1 1 --out a.png', 'nowhere.jpg: no such image'),
        (f'{PLAIN} empty.jpg --point 1 1 --out a.png', 'empty.jpg: cannot be read as an image'),
        (f'{PLAIN} {PHOTO} --point 1 -1 --out a.png', 'point is (x, y) from (0, 0) to (191, 159), got (1, -1)'),
        (f'{PLAIN} {PHOTO} --point 1 1 --out a.png --blocks 5 6', 'blocks are from 0 to 5, got 5, 6'),
        (f'{PLAIN} {PHOTO} --point 1 1 --out a.png --head 4', 'the heads of block 0 are from 0 to 3, got 4'),
        (f'{PLAIN} {PHOTO} --point 1 1 --out a.txt', '--out: file names end in .png, .jpg'),
        (f'{PLAIN} {PHOTO} --point 1 1 --out empty.jpg/a.png', "File exists: 'empty.jpg'"),
        (
            f'{PLAIN} {PHOTO} --point 1 1 --out a.png --size 31 64',
            'images have at least 32 pixels a side, got [31, 64]',
        ),
        ('nowhere.py x.jpg --point 1 1 --out a.png', 'nowhere.py: no such config'),
        (f'resnet.py {PHOTO} --point 1 1 --out a.png', 'only backbones of mmvitzoo are supported, got ResNet'),
    ],
)
def test_wrong_arguments_give_one_line(command, workspace, capsys, arguments, message):
    (workspace / 'empty.jpg').touch()
    (workspace / 'resnet.py').write_text("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'")
    with pytest.raises(SystemExit) as done:
        command(f'python tools/visualization/attention.py {arguments}')
    error = done.value.code if isinstance(done.value.code, str) else capsys.readouterr().err
    assert message in error.strip().splitlines()[-1] and (error.startswith('usage: ') or error.strip().count('\n') == 0)
    assert not list(workspace.glob('*a.png*')) and done.value.code != 0
