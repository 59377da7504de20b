"""`optimize_for_inference`: equal outputs, in place, idempotent, for inference on a CPU alone."""

import copy

import pytest
import torch
from forms import FORMS, slim
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from timm.layers import Mlp
from torch import nn

from mmvitzoo import optimize_for_inference
from mmvitzoo.models.layers import Attention, ConvRelativePosition, cpu

every_form = pytest.mark.parametrize('form', FORMS)


def assert_close(maps, expected, tolerance=1e-5):
    for a, b in zip(maps, expected):
        assert (a - b).norm() < tolerance * b.norm()


def trained(form):
    """Returns a model whose BatchNorm statistics differ from the initial ones."""
    model = slim(form).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, 64, 96))
    return model.eval()


@every_form
@pytest.mark.parametrize('elements', [2**22, 2**9])
def test_outputs_stay_equal(form, elements, monkeypatch):
    monkeypatch.setattr(cpu, 'HIDDEN_ELEMENTS', elements)
    monkeypatch.setattr(cpu, 'BIAS_ELEMENTS', elements)
    model = trained(form)
    optimized = copy.deepcopy(model)
    assert optimize_for_inference(optimized) is optimized
    types = {type(module) for module in optimized.modules()}
    assert cpu.OneDNNLinear in types and not types & {nn.Linear, Mlp, nn.BatchNorm2d, ConvRelativePosition}
    x = torch.randn(2, 3, 70, 96)
    with torch.no_grad():
        expected = model(x)
        assert_close(optimized(x), expected)
        modules = [id(module) for module in optimized.modules()]
        assert modules == [id(module) for module in optimize_for_inference(optimized).modules()]
        assert_close(optimized(x), expected)


@every_form
def test_gradients_and_autocast_still_work(form):
    model = trained(form)
    optimized = optimize_for_inference(copy.deepcopy(model))
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    expected = model(x)[-1]
    weight = torch.randn_like(expected)
    assert_close(torch.autograd.grad(optimized(x)[-1], x, weight), torch.autograd.grad(expected, x, weight), 1e-4)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert_close([y.float() for y in optimized(x)], [y.float() for y in model(x)], 0.05)


# Forms with the same optimized layers as another form.
REPEATED = ('vitae', 'vitdet_conv', 'mvitv2', 'mvitv2_mlp')


@pytest.mark.parametrize(
    'form', [pytest.param(form, marks=pytest.mark.slow if form in REPEATED else []) for form in FORMS]
)
def test_optimized_model_exports(form):
    model = trained(form)
    optimized = optimize_for_inference(copy.deepcopy(model))
    x = torch.randn(1, 3, 64, 64)
    program = torch.export.export(optimized, (x,))
    with torch.no_grad():
        assert_close(program.module()(x), model(x))


@every_form
def test_bfloat16_linears(form):
    model = trained(form)
    optimized = optimize_for_inference(copy.deepcopy(model), dtype=torch.bfloat16)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, expected = optimized(x), model(x)
    assert all(out.dtype == torch.float32 for out in maps)
    assert_close(maps, expected, 0.05)
    assert not torch.equal(maps[-1], expected[-1])


def test_detector_is_optimized_as_a_whole():
    config = Config.fromfile('configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = MODELS.build(config.model).eval()
    optimized = optimize_for_inference(copy.deepcopy(model))
    types = {type(module) for module in optimized.modules()}
    assert not types & {nn.Linear, nn.BatchNorm2d}
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert_close(optimized.extract_feat(x), model.extract_feat(x))
        head, expected_head = optimized.roi_head.bbox_head, model.roi_head.bbox_head
        features = torch.randn(5, head.in_channels, 7, 7)
        assert_close(head(features), expected_head(features))
        assert head(features[:0])[0].shape == (0, head.num_classes + 1)
        with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
            head(features[:, :8])


def test_convolutions_with_two_norms_are_not_folded():
    """RTMDet's heads share convolutions between levels, each with a norm of its own."""

    class SharedHead(nn.Module):
        def __init__(self):
            super().__init__()
            conv = nn.Conv2d(3, 3, 1, bias=False)
            self.low, self.high = (nn.Sequential(conv, nn.BatchNorm2d(3)) for _ in range(2))
            nn.init.constant_(self.high[1].weight, 2)

        def forward(self, x):
            return self.low(x), self.high(x)

    model = SharedHead().eval()
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        assert_close(optimize_for_inference(copy.deepcopy(model))(x), model(x))


def test_hooked_and_adapted_layers_are_left_alone():
    class Adapter(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x) + 1

    layer = Attention(16, 2).eval()
    layer.proj = Adapter(layer.proj)
    calls = []
    layer.qkv.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = layer(x)
        assert_close([optimize_for_inference(layer.eval())(x)], [expected])
    assert type(layer.qkv) is nn.Linear and len(calls) == 2


@pytest.mark.parametrize(
    'prepare, match',
    [
        (lambda model: model.train(), 'needs a model in eval mode, but PlainViT is in training mode'),
        (lambda model: model.eval().to('meta'), 'needs a model on a CPU, got one on meta'),
    ],
)
def test_models_in_training_or_on_another_device_are_refused(prepare, match):
    with pytest.raises(ValueError, match=match):
        optimize_for_inference(prepare(slim('vit')))


@every_form
def test_optimized_models_refuse_training_mode(form):
    model = optimize_for_inference(slim(form).eval())
    with pytest.raises(RuntimeError, match='a model cannot be trained after optimize_for_inference'):
        model.train()
    model.eval()


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match='dtype is None or torch.bfloat16, got torch.float16'):
        optimize_for_inference(slim('vit').eval(), dtype=torch.float16)
