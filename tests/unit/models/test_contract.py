"""Contract of every backbone, for every family and form."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from forms import FORMS, slim
from mmcv.cnn.utils import fuse_conv_bn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmvitzoo.models.backbones.mpvit import FactorizedAttention
from mmvitzoo.models.backbones.mvitv2 import PoolingAttention

WITH_BN = ('mpvit', 'vitae', 'vitae_s')
DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
every_form = pytest.mark.parametrize('form', FORMS)


@pytest.fixture
def fresh_compiler():
    """Resets the compiler, which would otherwise reuse graphs of other forms."""
    torch._dynamo.reset()


def assert_same_maps(maps, expected):
    assert len(maps) == len(expected)
    for a, b in zip(maps, expected):
        assert (a - b).norm() < 1e-5 * b.norm()


@every_form
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(32, 32), (197, 131), (64, 33)])
def test_maps_of_any_image_size(form, size, training):
    """Maps are also contiguous, which mmcv's RoIAlign needs and does not check."""
    model = slim(form).train(training)
    batch = 2 if training else 1
    maps = model(torch.randn(batch, 3, *size))
    assert [tuple(x.shape) for x in maps] == [
        (batch, channels, -(-size[0] // stride), -(-size[1] // stride))
        for channels, stride in zip(FORMS[form].channels, FORMS[form].strides)
    ]
    assert all(x.isfinite().all() and x.is_contiguous() for x in maps)
    assert model.out_channels == FORMS[form].channels


@every_form
def test_strides_are_those_of_the_maps(form):
    model = slim(form).eval()
    maps = model(torch.randn(1, 3, 96, 128))
    assert model.strides == tuple(96 // x.shape[2] for x in maps) == tuple(128 // x.shape[3] for x in maps)
    assert model.strides == FORMS[form].strides


@every_form
def test_gradients_reach_every_parameter(form):
    model = slim(form).train()
    sum((x * torch.randn_like(x)).sum() for x in model(torch.randn(2, 3, 64, 96))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_form
def test_out_indices_select_maps_and_layers_to_build(form):
    full, shorter = slim(form), slim(form, out_indices=(0, 2))
    missing, _ = shorter.load_state_dict(full.state_dict(), strict=False)
    assert not missing and sum(p.numel() for p in shorter.parameters()) < sum(p.numel() for p in full.parameters())
    x = torch.randn(1, 3, 64, 64)
    maps, selected = full.eval()(x), shorter.eval()(x)
    assert torch.equal(selected[0], maps[0]) and torch.equal(selected[1], maps[2])


@every_form
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages(form, frozen_stages):
    model = slim(form, frozen_stages=frozen_stages)
    before = copy.deepcopy(model.state_dict())
    assert model.train() is model
    model(torch.randn(2, 3, 64, 64))
    stage = FORMS[form].part
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (stage(name) > frozen_stages), name
        module = model.get_submodule(name.rpartition('.')[0])
        assert module is model or module.training == parameter.requires_grad, name
    for name, value in model.state_dict().items():
        if name.endswith('running_mean'):
            assert torch.equal(value, before[name]) == (stage(name) <= frozen_stages), name


@pytest.mark.parametrize('form', WITH_BN)
def test_norm_eval_keeps_batch_norm_statistics(form):
    model = slim(form, norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(torch.randn(2, 3, 64, 64))
    assert norms and all(not m.training and m.num_batches_tracked == 0 for m in norms)
    assert model.training and any(m.training for m in model.children())


@every_form
def test_batch_norms_fold_into_convolutions(form):
    model = slim(form).train()
    with torch.no_grad():
        for _ in range(3):  # statistics that differ from the initial ones
            model(torch.randn(2, 3, 64, 96))
    fused = fuse_conv_bn(copy.deepcopy(model.eval()))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    x = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        assert_same_maps(fused(x), model(x))


@every_form
def test_channels_last_gives_the_same_maps(form):
    model = slim(form).eval()
    x = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        expected = model(x)
        assert_same_maps(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)


def saved_elements(model, x):
    """Runs a forward and a backward pass; returns the number of elements saved for the latter."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss = sum(out.square().mean() for out in model(x))
    loss.backward()
    return sum(sizes)


@every_form
def test_with_cp_saves_memory_in_training_with_the_same_gradients(form):
    model, checkpointed = slim(form).train(), slim(form, with_cp=True).train()
    x = torch.randn(2, 3, 64, 64)
    assert saved_elements(checkpointed, x) < FORMS[form].recomputed * saved_elements(model, x)
    for (name, a), b in zip(model.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), checkpointed.buffers()):
        torch.testing.assert_close(a, b, msg=name)
    assert saved_elements(checkpointed.eval(), x) == saved_elements(model.eval(), x)


@every_form
def test_drop_path_acts_only_in_training_and_increases_linearly(form):
    model = slim(form, drop_path_rate=0.6)
    rates = [module.drop_path.drop_prob for module in model.modules() if hasattr(module, 'drop_path')]
    assert rates == [pytest.approx(0.6 * share) for share in FORMS[form].grows]
    x = torch.randn(1, 3, 64, 64)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert len({model(x)[-1].sum().item() for _ in range(8)}) > 1
    model.eval()
    torch.testing.assert_close(model(x)[-1], slim(form).eval()(x)[-1])


@every_form
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(form, dtype):
    model = slim(form).train()
    x = torch.randn(2, 3, 96, 64)
    with torch.autocast('cpu', dtype=dtype):
        maps = model(x)
    assert all(out.isfinite().all() for out in maps)
    sum(out.float().square().mean() for out in maps).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype):
        half = model(x)[0].float()
    with torch.no_grad():
        full = model(x)[0]
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('form', [form for form in FORMS if form != 'mpvit'])
def test_flash_kernels_apply(form, device):
    """Other kernels raise an error in this context. The attention of MPViT is two matrix products."""
    model = slim(form).to(device).train()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(device, torch.bfloat16):
        maps = model(torch.randn(2, 3, 224, 224, device=device))
        sum(x.float().mean() for x in maps).backward()
        with torch.no_grad():
            model(torch.randn(1, 3, 224, 224, device=device))


@pytest.mark.slow  # Inductor needs a C++ compiler, and half a minute for each form
@pytest.mark.parametrize('form', ['mpvit', 'vit', 'vitdet', 'vitae_s', 'mvitv2_windows', 'scalablevit'])
def test_compiles_without_graph_breaks(form, fresh_compiler):
    model = slim(form, out_indices=(0, 1)).eval()  # these stages have every kind of module
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 80, 96)
    with torch.no_grad():
        assert_same_maps(compiled(x), model(x))


QUICK_TO_COMPILE = ('vit', 'vitdet_conv')


@pytest.mark.parametrize(
    'form', [pytest.param(form, marks=[] if form in QUICK_TO_COMPILE else pytest.mark.slow) for form in FORMS]
)
def test_one_compiled_graph_serves_all_image_sizes(form, fresh_compiler):
    """A batch of one image has a second graph, since compilers specialize sizes of 1."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = slim(form, out_indices=(0, 1)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for shape in ((2, 3, 230, 256), (3, 3, 256, 288), (2, 3, 288, 227), (2, 3, 261, 240), (2, 3, 240, 290)):
            x = torch.randn(shape)
            assert_same_maps(compiled(x), model(x))
        assert len(graphs) == 1
        compiled(torch.randn(1, 3, 256, 240))
        assert len(graphs) == 2


@pytest.mark.parametrize(
    'form',  # two forms arrange the layers of the windowed MViTv2 in other ways
    [pytest.param(form, marks=pytest.mark.slow if form in ('mvitv2', 'mvitv2_mlp') else []) for form in FORMS],
)
def test_exports(form):
    model = slim(form).eval()
    x = torch.randn(2, 3, 80, 96)
    exported = torch.export.export(model, (x,))
    assert_same_maps(exported.module()(x), model(x))


@every_form
def test_state_dict_round_trip(form):
    source = slim(form)
    torch.manual_seed(1)
    target = FORMS[form].build(out_indices=(0, 1, 2, 3))
    target.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(source.eval()(x), target.eval()(x)))


@every_form
def test_wrong_input_shapes(form):
    model = slim(form).eval()
    patch = model.strides[0]
    for shape in ((1, 3, patch - 1, 64), (1, 3, 64, patch - 1), (3, 64, 64), (1, 4, 64, 64)):
        with pytest.raises(ValueError, match=rf'\(B, 3, H, W\) with H and W of at least {patch} pixels, got'):
            model(torch.zeros(shape))


def as_rgb(x):
    """Returns images of 3 channels on which a model gives the same maps as its adapted weights on ``x``."""
    if x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1)
    return 3 / x.shape[1] * torch.stack([x[:, i::3].sum(1) for i in range(3)], 1)  # channel i has the weights of i % 3


@every_form
@pytest.mark.parametrize('in_channels', [1, 4])
@torch.no_grad()
def test_weights_for_three_channels_are_adapted(form, in_channels):
    rgb, model = slim(form).eval(), slim(form, in_channels=in_channels).eval()
    model.load_state_dict(rgb.state_dict())
    x = torch.randn(1, in_channels, 64, 96)
    assert_same_maps(model(x), rgb(as_rgb(x)))


@every_form
def test_config_of_weights_has_their_channels(form):
    cfgs = [slim(form, in_channels=n).infer_cfg(slim(form, in_channels=n).state_dict())[0] for n in (3, 4)]
    assert 'in_channels' not in cfgs[0] and cfgs[1]['in_channels'] == 4


def forward_weights(attn, x, monkeypatch):
    """Returns the weights that an attention layer gives its values, (windows, heads, queries, keys)."""
    if isinstance(attn, FactorizedAttention):
        q, k, _ = rearrange(attn.qkv(x), 'b h w (n heads c) -> n b heads (h w) c', n=3, heads=8)
        return attn.scale * q @ k.softmax(2).mT
    weights = []

    def record(q, k, v, mask=None, scale=None):
        scores = scale * q @ k.mT
        weights.append((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1))
        return weights[0] @ v

    with monkeypatch.context() as patch:
        patch.setattr(F, 'scaled_dot_product_attention', record)
        attn(x)
    if isinstance(attn, PoolingAttention):  # heads are part of the batch
        return rearrange(weights[0], '(heads windows) 1 q k -> windows heads q k', heads=attn.num_heads)
    return weights[0]


@every_form
@torch.no_grad()
def test_attention_layers(form, monkeypatch):
    """The weights of one query are those of the forward pass; types, strides and windows describe the tokens."""
    model = slim(form).eval()
    layers, inputs = model.attention_layers(), {}
    for layer in layers:
        layer.attn.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
    height, width = 64, 240
    model(torch.randn(1, 3, height, width))
    assert len(inputs) == len(layers)
    assert [layer.stage for layer in layers] == sorted(layer.stage for layer in layers)
    for layer in layers:
        weights = forward_weights(layer.attn, inputs[layer.attn], monkeypatch)
        window = layer.window_size
        assert bool(window) == (layer.attn_type == 'window')
        assert len(weights) == (-(-height // window) * -(-width // window) if window else 1)
        area = (window, window) if window else (height, width)
        assert list(weights.shape[2:]) == [
            layer.num_prefix_tokens + -(-area[0] // stride) * -(-area[1] // stride)
            for stride in (layer.q_stride, layer.k_stride)
        ]
        for index, token in ((0, 0), (len(weights) - 1, weights.shape[2] // 2)):
            query_weights = layer.attn.attention_weights(inputs[layer.attn], index, token)
            torch.testing.assert_close(query_weights, weights[index, :, token])
            if form != 'mpvit':
                torch.testing.assert_close(query_weights.sum(-1), torch.ones(weights.shape[1]))
