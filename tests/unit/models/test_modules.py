"""Layers of every backbone behave as modules: tools that replace, hook or differentiate them work."""

import copy
import warnings

import pytest
import torch
from forms import FORMS, slim
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
from torch.ao.quantization import quantize_dynamic
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune

from mmvitzoo import optimize_for_inference
from mmvitzoo.analysis.cost import count_flops

every_form = pytest.mark.parametrize('form', FORMS)


def linears(model):
    return [module for module in model.modules() if type(module) is nn.Linear]


def train_two_steps(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        maps = model.train()(torch.randn(2, 3, 64, 64))
        loss = sum((out * torch.randn_like(out)).sum() for out in maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()


@every_form
@pytest.mark.parametrize('training', [True, False])
def test_forward_hooks_of_all_layers_fire(form, training):
    model = slim(form).train(training)
    fired = set()
    names = {module: name for name, module in model.named_modules() if module._parameters and module is not model}
    for module in names:
        module.register_forward_hook(lambda module, args, output: fired.add(names[module]))
    with torch.set_grad_enabled(training):
        model(torch.randn(2, 3, 70, 96))
    assert fired == set(names.values())


@every_form
def test_pruned_linears_train(form):
    model = slim(form)
    for module in linears(model):
        prune.l1_unstructured(module, 'weight', amount=0.5)
    train_two_steps(model)
    for module in linears(model):
        assert module.weight_orig.grad.abs().sum() > 0 and (module.weight == 0).float().mean() >= 0.49


@every_form
def test_weight_norm_of_linears_trains(form):
    model = slim(form)
    for module in linears(model):
        parametrizations.weight_norm(module)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if 'original0' in name}
    train_two_steps(model)
    trained = dict(model.named_parameters())
    assert before and all(not torch.equal(trained[name], value) for name, value in before.items())


@every_form
def test_dynamic_quantization_replaces_every_linear(form):
    model = slim(form).eval()
    count = len(linears(model))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        quantized = quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert count > 0 and sum(isinstance(module, QuantizedLinear) for module in quantized.modules()) == count
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, maps = model(x)[-1], quantized(x)[-1]
    assert 0 < (maps - expected).norm() < 0.1 * expected.norm()


@every_form
@pytest.mark.parametrize('optimized', [False, True])
def test_forward_mode_derivative_equals_finite_difference(form, optimized):
    """With frozen parameters under no_grad, where kernels without derivatives would lose the tangent silently."""
    model = slim(form).double().eval().requires_grad_(False)
    if optimized:
        optimize_for_inference(model)
    torch.manual_seed(0)
    x, tangent = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)

    def last_map(x):
        return model(x)[-1]

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(last_map, (x,), (tangent,))
        step = 1e-6
        difference = (last_map(x + step * tangent) - last_map(x - step * tangent)) / (2 * step)
    assert (derivative - difference).norm() < 1e-5 * difference.norm()


@pytest.mark.parametrize('form', [form for form in FORMS if form != 'mpvit'])
def test_forward_mode_raises_where_fused_attention_has_no_derivative(form):
    model = slim(form).eval()
    x = torch.randn(1, 3, 64, 64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(NotImplementedError, match='forward AD'):
        torch.func.jvp(lambda x: model(x)[-1], (x,), (x,))


@every_form
def test_hook_based_counter_agrees_with_get_flops(form):
    model = slim(form).eval()
    total = 0

    def count(module, args, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        model(x)
    flops = count_flops(slim(form).eval(), x)
    layers = sum(number for name, number in flops.items() if str(name).split('.')[-1] in ('addmm', 'mm', 'convolution'))
    assert total == pytest.approx(layers, rel=0.02)
