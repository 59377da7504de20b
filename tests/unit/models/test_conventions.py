"""Conventions of torch, MMEngine, MMPretrain and timm that their users rely on, for every family and form."""

import copy

import pytest
import timm
import torch
from forms import FORMS, slim
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from torchvision.models.feature_extraction import create_feature_extractor

from mmvitzoo.checkpoints import convert
from mmvitzoo.models import PlainViT
from mmvitzoo.models.backbones import BLOCKS

every_form = pytest.mark.parametrize('form', FORMS)


def assert_same_maps(maps, expected):
    assert len(maps) == len(expected)
    for a, b in zip(maps, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_form
@pytest.mark.parametrize('size', ['patch', (31, 31), 'narrow'], ids=str)
def test_images_from_one_patch_on(form, size):
    model = slim(form).eval()
    patch = model.strides[0]
    size = dict(patch=(patch, patch), narrow=(patch, 40)).get(size, size)
    maps = model(torch.randn(2, 3, *size))
    assert [x.shape[2:] for x in maps] == [tuple(-(-side // stride) for side in size) for stride in model.strides]
    assert all(x.isfinite().all() for x in maps)


@every_form
@pytest.mark.parametrize('size', [(64, 96), (70, 90)], ids=str)
def test_empty_batch_gives_empty_maps(form, size):
    model = slim(form).eval()
    assert [x.shape for x in model(torch.zeros(0, 3, *size))] == [
        (0, *x.shape[1:]) for x in model(torch.zeros(1, 3, *size))
    ]


def test_batch_norm_on_one_pixel_names_norm_eval():
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(
        ValueError, match=r'one image of 32 x 32 pixels is 1 x 1, where BatchNorm cannot .* norm_eval=True'
    ):
        slim('mpvit').train()(x)
    slim('mpvit', norm_eval=True).train()(x)
    slim('mpvit', out_indices=(2,)).train()(x)


@every_form
def test_gradients_have_the_strides_of_their_parameters(form):
    """Otherwise DDP warns that they do not match its buckets, and copies them."""
    model = slim(form).train()
    sum(x.sum() for x in model(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, x in model.named_parameters() if x.grad is not None and x.grad.stride() != x.stride()] == []


@every_form
def test_float64_is_kept(form):
    model = slim(form).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    tangent = torch.randn_like(x)

    def loss(x):
        return sum(y.cos().sum() for y in model(x))

    (gradient,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        difference = (loss(x + 1e-6 * tangent) - loss(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close((gradient * tangent).sum(), difference, rtol=1e-5, atol=1e-6)


@every_form
@pytest.mark.parametrize('training', [False, True])
def test_fx_traces_one_graph_for_all_sizes(form, training):
    model = slim(form).train(training)
    graph = torch.fx.symbolic_trace(model)
    *_, last, output = graph.graph.nodes
    assert output in last.users  # feature extractors of timm's users name the last node
    for size in ((64, 96), (70, 90)):
        x = torch.randn(2, 3, *size)
        for a, b in zip(graph(x), model(x)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    name = [name for name, _ in model.named_modules() if name.endswith('mlp')][-1]
    assert list(create_feature_extractor(model, [name])(x)) == [name]


@pytest.mark.parametrize('form', ['mpvit', 'vitae_s'])
def test_efficient_conv_bn_eval_of_mmengine(form):
    model, x = slim(form).eval(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    turn_on_efficient_conv_bn_eval_for_single_model(model)
    for a, b in zip(model(x), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_form
@pytest.mark.parametrize('training', [False, True])
def test_vmap_over_an_ensemble(form, training):
    models = [slim(form).double().train(training) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    params, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    stateless = copy.deepcopy(models[0]).to('meta').train(training)

    def forward(params, buffers):
        return torch.func.functional_call(stateless, (params, buffers), (x,))

    maps = torch.func.vmap(forward, randomness='different')(params, buffers)
    for i, model in enumerate(models):
        for a, b in zip(maps, model(x)):
            torch.testing.assert_close(a[i], b, rtol=1e-9, atol=1e-9)


@every_form
def test_indices_count_from_the_end_or_are_one_number(form):
    x = torch.randn(1, 3, 64, 64)
    expected = slim(form).eval()(x)
    for indices, wanted in (((-2, -1), expected[2:]), (-1, expected[3:]), (3, expected[3:])):
        model = slim(form, out_indices=indices).eval()
        assert model.out_indices == tuple(range(4 - len(wanted), 4))
        assert_same_maps(model(x), wanted)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(out_indices={1}), r'out_indices is a sequence of numbers or one number, got \{1\}'),
        (dict(out_indices=('a',)), r"out_indices is a sequence of numbers or one number, got \('a',\)"),
        (dict(out_indices=-5), r'out_indices is an increasing sequence of numbers from 0 to 3, got -5$'),
        (dict(out_indices=(0, -4)), r'out_indices is an increasing sequence of numbers from 0 to 3, got \(0, -4\)$'),
        (dict(out_indices=True), 'out_indices is a sequence of numbers or one number, got True'),
        (dict(frozen_stages=True), 'frozen_stages is a number from -1 to .*, got True'),
        (dict(drop_path_rate=False), 'drop_path_rate is at least 0 and less than 1, got False'),
        (dict(init_cfg='a.pth'), "init_cfg is a dict, a list of dicts or None, got 'a.pth'"),
        (dict(pretrained='a.pth', init_cfg=dict(type='Pretrained')), 'pretrained is .*, without init_cfg beside it'),
        (dict(pretrained=3), 'pretrained is a path or address'),
    ],
)
@pytest.mark.parametrize('form', ['mpvit', 'vit'])
def test_arguments_of_a_wrong_type_are_one_line(form, kwargs, message):
    with pytest.raises(ValueError, match=message):
        FORMS[form].build(**kwargs)


@pytest.mark.parametrize('form', ['mpvit', 'vitae'])
@pytest.mark.parametrize('norm_cfg', ['BN', dict(requires_grad=True)], ids=str)
def test_norm_cfg_is_a_dict_with_a_type(form, norm_cfg):
    with pytest.raises(ValueError, match=r"norm_cfg is a dict such as dict\(type='BN'\), got "):
        FORMS[form].build(norm_cfg=norm_cfg)


@every_form
def test_pretrained_is_short_for_init_cfg(form):
    assert FORMS[form].build(pretrained='a.pth').init_cfg == dict(type='Pretrained', checkpoint='a.pth')


@every_form
def test_attributes_of_mmpretrain(form):
    model = slim(form)
    assert (model.embed_dims, model.num_layers) == (model.arch['embed_dims'], model.arch['num_layers'])


@every_form
def test_set_grad_checkpointing(form):
    model = slim(form)
    model.set_grad_checkpointing()
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    assert blocks and all(block.with_cp for block in blocks)
    model.set_grad_checkpointing(False)
    assert not any(block.with_cp for block in blocks)


@every_form
def test_forward_intermediates(form):
    model, x = slim(form).eval(), torch.randn(1, 3, 64, 96)
    expected = model(x)
    final, maps = model.forward_intermediates(x, norm=True)
    # Plain backbones apply their last norm to every map.
    normalized = expected[-1:] if form.startswith(('vit', 'dinov2')) else expected
    assert_same_maps(maps[-len(normalized) :], normalized)
    (last,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt='NHWC')
    assert_same_maps([last.permute(0, 3, 1, 2)], expected[-1:])
    (second,) = model.forward_intermediates(x, indices=[1], norm=len(normalized) > 1, intermediates_only=True)
    assert_same_maps([second], expected[1:2])
    with pytest.raises(ValueError, match='indices is an increasing sequence of numbers from 0 to 3, got'):
        model.forward_intermediates(x, indices=[4])
    with pytest.raises(ValueError, match="output_fmt is 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(x, output_fmt='NLC')


@every_form
def test_initialized_model_is_not_initialized_again(form, tmp_path):
    """As in BaseModule: users set is_init to keep weights that they have loaded."""
    model = FORMS[form].build(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'nowhere.pth')))
    model.is_init = True
    model.init_weights()


@pytest.mark.parametrize('form', ['mvitv2', 'mvitv2_windows'])
def test_init_cfg_of_layers_keeps_initial_relative_positions(form):
    """The paper initializes them as other weights; ViTDet and ViTAE start from zero."""
    model = FORMS[form].build(init_cfg=dict(type='Kaiming', layer='Linear'))
    model.init_weights()
    assert all(0.015 < x.std() < 0.025 for name, x in model.named_parameters() if 'rel_pos' in name and x.numel() > 400)


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('indices', [None, 2, [0, 5]], ids=str)
def test_forward_intermediates_equals_timm(norm, indices):
    theirs = timm.create_model('vit_tiny_patch16_224', img_size=64).eval()
    model = PlainViT('tiny', img_size=64).eval()
    model.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    kwargs = dict(indices=indices, norm=norm, return_prefix_tokens=True)
    final, pairs = model.forward_intermediates(x, **kwargs)
    expected_final, expected_pairs = theirs.forward_intermediates(x, **kwargs)
    torch.testing.assert_close(final, expected_final, rtol=1e-4, atol=1e-4)
    for (feature_map, prefix), (expected_map, expected_prefix) in zip(pairs, expected_pairs):
        torch.testing.assert_close(feature_map, expected_map, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prefix, expected_prefix, rtol=1e-4, atol=1e-4)
    assert len(pairs) == len(expected_pairs)


@pytest.mark.parametrize('out_type', ['raw', 'cls_token', 'featmap', 'avg_featmap'])
def test_out_types_equal_mmpretrain(out_type):
    from mmpretrain.models import VisionTransformer

    arch = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96)
    theirs = VisionTransformer(arch, img_size=64, out_type=out_type, out_indices=(0, 1))
    theirs.eval()  # returns None
    ours = PlainViT(
        dict(embed_dims=48, num_layers=2, num_heads=3, mlp_ratio=2), img_size=64, out_type=out_type, out_indices=(0, 1)
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    result = convert(theirs.state_dict(), source='mmpretrain')
    assert result.backbone_cfg.get('out_type', out_type) == out_type
    ours.load_state_dict(result.backbone)
    x = torch.randn(2, 3, 64, 64)
    assert_same_maps(ours(x), theirs(x))


def test_output_cls_token_equals_mmsegmentation():
    """MMSegmentation's DPT head reads pairs of a map and a class token."""
    model = slim('vit', output_cls_token=True).eval()
    x = torch.randn(1, 3, 64, 64)
    tokens = slim('vit', out_type='cls_token').eval()(x)
    for (feature_map, token), expected_map, expected_token in zip(model(x), slim('vit').eval()(x), tokens):
        assert torch.equal(feature_map, expected_map) and torch.equal(token, expected_token)
