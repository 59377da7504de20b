"""What every backbone promises, for every family and form."""

import copy

import pytest
import torch
from forms import FORMS, slim
from mmcv.cnn.utils import fuse_conv_bn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WITH_BN = ('mpvit', 'vitae', 'vitae_s')
DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
every_form = pytest.mark.parametrize('form', FORMS)


@pytest.fixture
def fresh_compiler():
    """One that has seen no other form of a model."""
    torch._dynamo.reset()


def assert_same_maps(maps, expected):
    assert len(maps) == len(expected)
    for a, b in zip(maps, expected):
        assert (a - b).norm() < 1e-5 * b.norm()


@every_form
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(32, 32), (197, 131), (64, 33)])
def test_any_size(form, size, training):
    """Maps are contiguous, too: mmcv's RoIAlign would silently read others as noise."""
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
def test_gradients_reach_every_parameter(form):
    model = slim(form).train()
    sum((x * torch.randn_like(x)).sum() for x in model(torch.randn(2, 3, 64, 96))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_form
def test_gradient_form_equals_inference_form(form):
    """Relative positions are an extension of q and k in training, a bias in inference on a CPU."""
    model = slim(form).eval()
    x = torch.randn(2, 3, 70, 96)
    with torch.no_grad():
        expected = model(x)
    assert_same_maps(model(x), expected)


@every_form
def test_out_indices_choose_maps_and_build_no_more(form):
    full, part = slim(form), slim(form, out_indices=(0, 2))
    missing, _ = part.load_state_dict(full.state_dict(), strict=False)
    assert not missing and sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in full.parameters())
    x = torch.randn(1, 3, 64, 64)
    maps, chosen = full.eval()(x), part.eval()(x)
    assert torch.equal(chosen[0], maps[0]) and torch.equal(chosen[1], maps[2])


@every_form
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages(form, frozen_stages):
    model = slim(form, frozen_stages=frozen_stages)
    before = copy.deepcopy(model.state_dict())
    assert model.train() is model
    model(torch.randn(2, 3, 64, 64))
    part = FORMS[form].part
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part(name) is None or part(name) > frozen_stages), name
        module = model.get_submodule(name.rpartition('.')[0])
        assert module.training == parameter.requires_grad, name
    for name, value in model.state_dict().items():
        if name.endswith('running_mean'):
            assert torch.equal(value, before[name]) == (part(name) <= frozen_stages), name


@pytest.mark.parametrize('form', WITH_BN)
def test_norm_eval_keeps_statistics(form):
    model = slim(form, norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(torch.randn(2, 3, 64, 64))
    assert norms and all(not m.training and m.num_batches_tracked == 0 for m in norms)
    assert model.training and any(m.training for m in model.children())


@every_form
def test_norms_fold_into_convolutions(form):
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
def test_channels_last_changes_nothing(form):
    model = slim(form).eval()
    x = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        expected = model(x)
        assert_same_maps(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)


@every_form
def test_activation_checkpointing_keeps_less_and_changes_nothing(form):
    keeping, saving = slim(form), slim(form, with_cp=True)
    x = torch.randn(2, 3, 64, 64)
    kept = []
    for model in (keeping, saving):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            loss = sum(out.square().mean() for out in model.train()(x))
        loss.backward()
        kept.append(sum(sizes))
    assert kept[1] < FORMS[form].recomputed * kept[0]
    for (name, a), b in zip(keeping.named_parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(keeping.named_buffers(), saving.buffers()):
        torch.testing.assert_close(a, b, msg=name)


@every_form
def test_drop_path_acts_in_training_only_and_grows_linearly(form):
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
        low = model(x)[0].float()
    with torch.no_grad():
        full = model(x)[0]
    assert (low - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('form', [form for form in FORMS if form != 'mpvit'])
def test_flash_kernels_are_taken(form, device):
    """Anything else raises in this context; MPViT's attention needs no kernel."""
    model = slim(form).to(device).train()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(device, torch.bfloat16):
        maps = model(torch.randn(2, 3, 224, 224, device=device))
        sum(x.float().mean() for x in maps).backward()
        with torch.no_grad():
            model(torch.randn(1, 3, 224, 224, device=device))


@pytest.mark.slow  # Inductor needs a compiler, and half a minute for a form
@pytest.mark.parametrize('form', ['mpvit', 'vit', 'vitdet', 'vitae_s', 'mvitv2_windows', 'scalablevit'])
def test_compiles_without_graph_break(form, fresh_compiler):
    model = slim(form, out_indices=(0, 1)).eval()  # they hold every kind of module
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 80, 96)
    with torch.no_grad():
        assert_same_maps(compiled(x), model(x))


QUICK_TO_COMPILE = ('vit', 'vitdet_conv')


@pytest.mark.parametrize(
    'form', [pytest.param(form, marks=[] if form in QUICK_TO_COMPILE else pytest.mark.slow) for form in FORMS]
)
def test_compiles_once_for_many_sizes(form, fresh_compiler):
    """Once for a batch, and once more for one image, whose sizes compilers treat as numbers."""
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


@every_form
def test_exports(form):
    model = slim(form).eval()
    x = torch.randn(2, 3, 80, 96)
    program = torch.export.export(model, (x,))
    assert_same_maps(program.module()(x), model(x))


@every_form
def test_state_dict_round_trip(form):
    source = slim(form)
    torch.manual_seed(1)
    target = FORMS[form].build(out_indices=(0, 1, 2, 3))
    target.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(source.eval()(x), target.eval()(x)))


@every_form
def test_wrong_input(form):
    model = slim(form).eval()
    for shape in ((1, 3, 31, 64), (1, 3, 64, 16), (3, 64, 64), (1, 4, 64, 64)):
        with pytest.raises(ValueError, match='H and W of at least 32 pixels, got'):
            model(torch.zeros(shape))
