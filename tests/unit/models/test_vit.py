"""PlainViT and ViTAE: parity with the original implementations, details of the families, wrong arguments."""

import pytest
import torch
from forms import FORMS, VIT_ARCH, VITAE, VITDET, build_converted, slim
from mmengine.registry import MODELS
from torch import nn

from mmvitzoo.checkpoints import convert
from mmvitzoo.models import PlainViT, ViTAE

every_form = pytest.mark.parametrize('form', [form for form in FORMS if form.startswith('vit')])


@pytest.mark.stack
@pytest.mark.parametrize('name', ['vitdet_d2_small', 'vitdet_d2_conv-propagation'])
def test_equals_detectron2(name, load_golden):
    reference = load_golden(name)
    converted = convert(reference.state_dict)
    assert (converted.family, converted.source) == ('plainvit', 'detectron2')
    model = build_converted(converted)
    neck = MODELS.build(dict(type='SimpleFeaturePyramid', in_channels=96)).eval()
    neck.load_state_dict(without_prefix('neck.', converted), strict=True)
    assert list(reference.input.shape[2:]) == [256, 320]
    with torch.no_grad():
        maps = model(reference.input)
        outputs = dict(last_feat=maps[0], **{f'p{i}': x for i, x in enumerate(neck(maps)[:4], 2)})
    check_outputs(outputs, reference)


@pytest.mark.stack
@pytest.mark.parametrize(
    'name, family',
    [('vitdet_vitae-repo_small', 'plainvit'), ('vitae_vitae-repo_small', 'vitae'), ('vitae-s_vitae-repo', 'vitae')],
)
def test_equals_vitae_repository(name, family, load_golden):
    reference = load_golden(name)
    converted = convert(reference.state_dict)
    assert (converted.family, converted.source) == (family, 'vitae-repository')
    model = build_converted(converted)
    neck = MODELS.build(
        dict(type='SimpleFeaturePyramid', in_channels=model.out_channels[0], halve_channels=False)
    ).eval()
    missing, unexpected = neck.load_state_dict(without_prefix('neck.', converted), strict=False)
    assert not unexpected and not any(key.startswith('rescale') for key in missing)
    with torch.no_grad():
        (x,) = model(reference.input)
        outputs = dict(
            tokens=x.flatten(2).transpose(1, 2), **{f'level{i}': level(x) for i, level in enumerate(neck.rescale, 1)}
        )
    check_outputs(outputs, reference)


def test_rel_pos_scaled_equals_vitae_repository(load_golden):
    """The unconverted tables of the file fit a model with ``rel_pos_scaled=True``."""
    reference = load_golden('vitdet_vitae-repo_small')
    converted = convert(reference.state_dict)
    weights = dict(converted.backbone)
    weights.update({key: value for key, value in reference.state_dict.items() if 'rel_pos' in key})
    model = MODELS.build(dict(converted.backbone_cfg, rel_pos_scaled=True)).eval()
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        tokens = model(reference.input)[0].flatten(2).transpose(1, 2)
    assert reference.error('tokens', tokens) < 1e-5


def without_prefix(prefix, converted):
    return {key[len(prefix) :]: value for key, value in converted.state_dict.items() if key.startswith(prefix)}


def check_outputs(outputs, reference):
    assert outputs.keys() == reference.case['outputs'].keys()
    for name, tensor in outputs.items():
        # Ten times tighter than required, so that a wrong eps or GELU fails.
        assert reference.error(name, tensor) < 1e-5, name


@pytest.mark.parametrize(
    'arch, params',  # timm's classifiers without their heads
    [('tiny', 5_524_416), ('small', 21_665_664), ('base', 85_798_656), ('large', 303_301_632), ('huge', 630_764_800)],
)
def test_number_of_parameters(arch, params):
    with torch.device('meta'):
        model = PlainViT(arch)
    # The huge model of timm has patches of 14 pixels, and 256 of them.
    difference = 3 * 1280 * (16**2 - 14**2) - 60 * 1280 if arch == 'huge' else 0
    assert sum(p.numel() for p in model.parameters()) == params + difference


def test_number_of_parameters_of_vitae():
    """The reference case counts a feature pyramid and the fixed random features as well."""
    pyramid = 3 * (384 * 384 * 4 + 384) + 2 * 384
    model = ViTAE('small', img_size=256)
    assert sum(p.numel() for p in model.parameters()) == 25_469_728 - pyramid - 48 * 96 - 96 * 192
    features = [value for name, value in model.named_buffers() if name.endswith('random_features')]
    assert [tuple(value.shape) for value in features] == [(48, 96), (96, 192)]


@every_form
def test_images_are_padded_with_zeros(form):
    """An image that 16 does not divide has zeros added at the bottom and on the right."""
    model = slim(form).eval()
    x = torch.zeros(1, 3, 64, 96)
    x[:, :, :50, :81] = torch.randn(1, 3, 50, 81)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :, :50, :81]), model(x))


@every_form
def test_only_the_last_map_is_normalized(form):
    full, shorter = slim(form, out_indices=(0, 3)), slim(form, out_indices=(0, 2))
    assert len(shorter.blocks) == 3 and not hasattr(shorter.norm, 'weight')
    x = torch.randn(1, 3, 64, 64)
    first, last = full.eval()(x)
    assert last.mean(1).abs().max() < 1e-5 < first.mean(1).abs().max()
    raw = slim(form, final_norm=False)
    raw.load_state_dict(full.state_dict(), strict=False)
    normed = nn.functional.layer_norm(raw.eval()(x)[-1].permute(0, 2, 3, 1), (48,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(normed, last)
    # By default only the last map is returned.
    assert [tuple(x.shape) for x in FORMS[form].build()(x)] == [(1, 48, 4, 4)]


@pytest.mark.parametrize('form', ['vitae', 'vitae_s'])
def test_norm_cfg(form):
    assert isinstance(slim(form, norm_cfg=dict(type='SyncBN')).blocks[0].pcm[1], nn.SyncBatchNorm)


def test_class_token_takes_part_in_attention_and_is_returned():
    model = slim('vit', out_type='cls_token', out_indices=(1, 3)).eval()
    maps = slim('vit').eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = model(x)
    assert [tuple(y.shape) for y in tokens] == [(2, 48), (2, 48)]
    before = maps(x)[0]
    nn.init.normal_(maps.cls_token)
    assert not torch.allclose(maps(x)[0], before)


def test_positions_are_interpolated():
    model = slim('vit').eval()
    pos_embed = model.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    pos_embed = nn.functional.interpolate(pos_embed, (3, 6), mode='bicubic', align_corners=False)
    inputs = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.extend(args))
    x = torch.randn(1, 3, 48, 96)
    model(x)
    patches = (model.patch_embed.proj(x) + pos_embed).flatten(2).transpose(1, 2)
    expected = torch.cat([model.cls_token + model.pos_embed[:, :1], patches], 1)
    torch.testing.assert_close(inputs[0], expected)


@every_form
def test_norm_eps_is_that_of_the_original(form):
    model = slim(form)
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert {value for name, value in eps.items() if not name.startswith('patch_embed.')} == {1e-6}
    assert {value for name, value in eps.items() if name.startswith('patch_embed.')} <= {1e-5}
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} <= {1e-5}


@every_form
def test_initialization(form):
    torch.manual_seed(0)
    model = FORMS[form].build()
    model.init_weights()
    weights = model.state_dict()
    assert weights['blocks.1.attn.qkv.weight'].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights['blocks.1.mlp.fc1.bias'].abs().max() == 0
    if 'pos_embed' in weights:
        assert weights['pos_embed'].std().item() == pytest.approx(0.02, rel=0.15)
    if form == 'vitdet_conv':  # the residual convolution is the identity
        x = torch.randn(1, 4, 4, 48)
        assert torch.equal(model.blocks[1].residual(x), x)
    if 'rel_pos_h' in str(weights.keys()):
        assert weights['blocks.0.attn.rel_pos_h'].abs().max() == 0
        assert weights['blocks.0.attn.rel_pos_h'].shape == (5, 16)
        if form != 'vitdet_conv':
            assert weights['blocks.1.attn.rel_pos_h'].shape == (11, 16)


def test_random_features_are_orthogonal():
    features = slim('vitae_s').patch_embed[1].attn.random_features
    torch.testing.assert_close(features @ features.T, 16 * torch.eye(16), atol=1e-4, rtol=1e-4)


def test_layer_depth():
    model = slim('vitdet_conv')
    depth = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')[0] for name in model.state_dict()}
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (5, 6)
    assert model.get_layer_depth('neck.rescale.0.0.weight', 'backbone.') == (5, 6)
    assert depth['pos_embed'] == depth['patch_embed.proj.weight'] == 0
    assert depth['blocks.0.attn.rel_pos_h'] == 1 and depth['blocks.3.mlp.fc2.bias'] == 4
    assert depth['norm.weight'] == depth['blocks.1.residual.0.weight'] == 5


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='vast'), "arch is one of tiny, small, .*, 7b, or a dict, got 'vast'"),
        (dict(arch=dict(embed_dims=64)), 'keys of an arch dict are embed_dims, .* got embed_dims'),
        (dict(arch=dict(VIT_ARCH, embed_dims=50)), 'embed_dims is a multiple of num_heads, got 50 and 3'),
        (dict(arch=dict(VIT_ARCH, num_layers=0)), 'num_layers is an integer of at least 1, got 0'),
        (dict(arch=dict(VIT_ARCH, num_heads=1.5)), 'num_heads is an integer of at least 1, got 1.5'),
        (dict(img_size=(224,)), r'img_size is a number of pixels, at least 1, or \(H, W\), got \(224,\)'),
        (dict(img_size=0), 'img_size is .* got 0'),
        (dict(pretrain_img_size='224'), "pretrain_img_size is .* got '224'"),
        (dict(img_size=224.0), 'img_size is .* got 224.0'),
        (dict(VITDET, global_attn_indexes=2), 'global_attn_indexes are blocks from 0 to 3, got 2'),
        (dict(patch_size=0), r'patch_size is a number of pixels, at least 1, or \(H, W\), got 0'),
        (dict(ffn_type='glu'), "ffn_type is one of mlp, swiglu, got 'glu'"),
        (dict(pos_type='sincos'), "pos_type is one of learned, rope, learned.rope, got 'sincos'"),
        (dict(rope_type='2d'), "rope_type is one of dinov3, pe, sbb, axial, mixed, got '2d'"),
        (dict(act='relu'), "act is one of gelu, gelu_tanh, quick_gelu, got 'relu'"),
        (dict(act=['gelu']), 'act is one of .* got .*gelu'),
        (dict(norm_eps=float('nan')), 'norm_eps is a number of at least 0, got nan'),
        (dict(with_cls_token='no'), "with_cls_token is True or False, got 'no'"),
        (dict(VITDET, rel_pos_std='a'), "rel_pos_std is a number of at least 0, got 'a'"),
        (dict(VITDET, global_attn_indexes=[[1]]), 'global_attn_indexes are blocks from 0 to 3, got'),
        (dict(arch=dict(VIT_ARCH, mlp_ratio=float('nan'))), 'mlp_ratio is a positive number, got nan'),
        (dict(num_register_tokens=-1), 'num_register_tokens is an integer of at least 0, got -1'),
        (dict(VITDET, num_register_tokens=2), 'window_size, .* need with_cls_token=False and num_register_tokens=0'),
        (dict(VITDET, pos_type='rope'), "pos_type='rope' needs global attention"),
        (dict(norm_outputs=True, final_norm=False), 'norm_outputs needs final_norm=True'),
        (dict(rope_type='pe'), "rope_type='pe' needs pos_type='rope' or 'learned.rope'"),
        (dict(out_indices=(3, 4)), 'out_indices is an increasing sequence of numbers from 0 to 3, got .3, 4.'),
        (dict(out_type='map'), "out_type is one of featmap, cls_token, avg_featmap, raw, got 'map'"),
        (
            dict(out_type='cls_token', with_cls_token=False),
            "out_type='cls_token' and output_cls_token need with_cls_token=True",
        ),
        (dict(window_size=7), 'window_size, use_rel_pos and residual_block_indexes need with_cls_token=False'),
        (dict(use_rel_pos=True), 'use_rel_pos .* need with_cls_token=False'),
        (dict(residual_block_indexes=(1,)), 'residual_block_indexes need with_cls_token=False'),
        (dict(VITDET, window_size=-1), 'window_size is an integer of at least 0, got -1'),
        (dict(VITDET, global_attn_indexes=(4,)), r'global_attn_indexes are blocks from 0 to 3, got \(4,\)'),
        (dict(VITDET, residual_block_indexes=(-1,)), r'residual_block_indexes are blocks from 0 to 3, got \(-1,\)'),
        (dict(VITDET, window_size=0), 'global_attn_indexes without window_size'),
        (dict(drop_path_rate=1.0), 'drop_path_rate is at least 0 and less than 1, got 1.0'),
        (dict(frozen_stages=5), 'frozen_stages is a number from -1 to 4, got 5'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f'PlainViT: .*{message}'):
        PlainViT(**{'arch': VIT_ARCH, **kwargs})


@pytest.mark.parametrize(
    'arch, message',
    [
        ('large', "arch is one of base, small, or a dict, got 'large'"),
        (dict(VITAE, embed_dims=51), 'embed_dims is a multiple of 4, got 51'),
        (dict(VITAE, pcm_convs=4), 'pcm_convs is 2 or 3, got 4'),
        (dict(VITAE, reduction_dims=(1, 2, 3)), r'reduction_dims is None or two numbers .* got \(1, 2, 3\)'),
        (dict(VITAE, reduction_dims=5), 'reduction_dims is None or two numbers .* got 5'),
        (dict(VITAE, mlp_ratio=3.3), r'embed_dims \* mlp_ratio is a multiple of embed_dims / 4, got 48 and 3.3'),
        (dict(VITAE, global_attn_indexes=(7,)), r'global_attn_indexes are blocks from 0 to 3, got \(7,\)'),
    ],
)
def test_wrong_arguments_of_vitae(arch, message):
    with pytest.raises(ValueError, match=f'ViTAE: {message}'):
        ViTAE(arch)
