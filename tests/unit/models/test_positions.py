"""Positions, patches and heads of PlainViT: those of other grids, and what checkpoints tell about them."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from forms import VIT_ARCH, VITDET
from mmengine.registry import MODELS
from mmengine.runner import checkpoint

from mmvitzoo.checkpoints import CheckpointError, convert, load, load_pretrained, save
from mmvitzoo.models import PlainViT
from mmvitzoo.models.backbones import vit
from mmvitzoo.models.layers import RotaryPositions, apply_rotary, resize_pos_embed


@pytest.mark.parametrize('size', [(9, 13), (8, 11), (14, 14), (1, 2)])
@pytest.mark.parametrize('offset, antialias', [(0.0, False), (0.1, False), (0.0, True)])
def test_resized_positions_equal_interpolate(size, offset, antialias):
    """The authors of DINOv2 pass the scale factors of an offset; other rules pass sizes."""
    torch.manual_seed(0)
    table = torch.randn(1, 81, 3)
    maps = table.double().unflatten(1, (9, 9)).permute(0, 3, 1, 2)
    scale = dict(scale_factor=[(side + offset) / 9 for side in size]) if offset else dict(size=size)
    expected = F.interpolate(maps, mode='bicubic', antialias=antialias, **scale).permute(0, 2, 3, 1).float()
    torch.testing.assert_close(resize_pos_embed(table, (9, 9), size, offset, antialias), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('antialias', [False, True])
def test_positions_of_the_learned_grid_are_unchanged(antialias):
    table = torch.randn(1, 54, 3)
    assert torch.equal(resize_pos_embed(table, (6, 9), (6, 9), 0.1, antialias).flatten(1, 2), table)


def test_rotation_depends_on_the_distance_in_a_grid_alone():
    """q.k after rotation is a function of the offset between the tokens; prefix tokens are not rotated."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    cos, sin, _ = RotaryPositions(8, num_prefix_tokens=3)((4, 5))
    assert cos.shape == (3 + 20, 4)
    assert torch.equal(cos[:3], torch.ones(3, 4)) and torch.equal(sin[:3], torch.zeros(3, 4))
    rotated_q, rotated_k = (
        apply_rotary(x.expand(1, 1, 20, 8), cos[3:].double(), sin[3:].double())[0, 0] for x in (q, k)
    )
    scores = (rotated_q @ rotated_k.T).view(4, 5, 4, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3], rtol=0, atol=1e-5)
    assert (scores[0, 0, 1, 2] - scores[0, 0, 2, 2]).abs() > 1e-3


def test_periods_stay_in_float32():
    model = PlainViT(VIT_ARCH, pos_type='rope').half()
    assert model.rope.periods.dtype == torch.float32 and model.pos_embed is None
    model.load_state_dict({**model.state_dict(), 'rope.periods': torch.arange(4) + 2.0})
    assert model.rope.periods.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize('rope_type', ['pe', 'sbb'])
def test_scaled_coordinates_keep_the_grid_of_pretraining(rope_type, tmp_path):
    """A model for larger images computes the same as one of the size of its checkpoint."""
    torch.manual_seed(0)
    kwargs = dict(pos_type='learned+rope', rope_type=rope_type, interpolate_antialias=True)
    pretrained, model = build(64, **kwargs).eval(), build((96, 128), **kwargs).eval()
    torch.nn.init.normal_(pretrained.blocks[0].attn.qkv.weight)
    save(pretrained.state_dict(), tmp_path / 'a.pth')
    load_pretrained(model, str(tmp_path / 'a.pth'))
    x = torch.randn(1, 3, 96, 128)
    assert model.rope.grid.tolist() == [4, 4]
    torch.testing.assert_close(model(x)[0], pretrained(x)[0], rtol=0, atol=1e-5)
    model.rope.grid *= 2
    assert (model(x)[0] - pretrained(x)[0]).abs().max() > 1e-3


def test_rotary_positions_of_another_convention_are_refused(tmp_path):
    save(build(64, pos_type='rope', rope_type='axial').state_dict(), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match="belong to rope_type='axial', the model has rope_type='dinov3'"):
        load_pretrained(build(64, pos_type='rope'), str(tmp_path / 'a.pth'))


def build(img_size, arch=dict(VIT_ARCH, num_layers=1), **kwargs):
    return PlainViT(arch, img_size=img_size, **kwargs)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_checkpoints_tell_grid_and_heads(tmp_path, suffix):
    """288 x 512 pixels have as many tokens as 384 x 384, and a file of this package tells which."""
    wide, square = build((288, 512)), build(384)
    save(wide.state_dict(), tmp_path / f'a{suffix}')
    result = convert(load(tmp_path / f'a{suffix}'))
    assert result.assumed == {}
    assert result.backbone_cfg['img_size'] == (288, 512) and result.backbone_cfg['arch']['num_heads'] == 3
    load_pretrained(square, str(tmp_path / f'a{suffix}'))
    expected = resize_pos_embed(wide.pos_embed[:, 1:], (18, 32), (24, 24)).flatten(1, 2)
    torch.testing.assert_close(square.pos_embed[:, 1:], expected)
    with pytest.raises(CheckpointError, match='belong to num_heads=3, the model has num_heads=4'):
        load_pretrained(PlainViT(dict(VIT_ARCH, num_layers=1, num_heads=4), img_size=384), str(tmp_path / f'a{suffix}'))


def test_positions_without_metadata_have_the_ratio_of_the_model(caplog):
    for img_size, loaded_size in (((288, 512), (144, 256)), ((288, 512), (288, 512)), ((288, 512), 64)):
        model, other = build(img_size), build(loaded_size)
        model.load_state_dict(dict(other.state_dict()))
        expected = resize_pos_embed(other.pos_embed[:, 1:], other.pos_embed_grid, (18, 32)).flatten(1, 2)
        assert torch.equal(model.pos_embed[:, 1:], expected)
    with pytest.raises(RuntimeError, match='size mismatch for pos_embed'):
        model.load_state_dict(dict(build((48, 80)).state_dict()))


def test_first_position_is_kept_without_class_token():
    """5 x 10 positions are one more than a square."""
    model = build((80, 160), with_cls_token=False)
    assert convert(dict(model.state_dict())).backbone['pos_embed'].shape[1] == 50
    other = build((80, 160), with_cls_token=False)
    other.load_state_dict(dict(model.state_dict()))
    assert torch.equal(other.pos_embed, model.pos_embed)


@pytest.mark.parametrize('img_size', [64, (64, 96)])
def test_missing_place_of_the_class_token_is_zero(img_size):
    """timm's models with registers have positions of patches alone."""
    model = build(img_size, num_register_tokens=2)
    weights = dict(model.state_dict())
    weights['pos_embed'] = weights['pos_embed'][:, 1:]
    model.load_state_dict(weights)
    assert not model.pos_embed[:, 0].any() and torch.equal(model.pos_embed[:, 1:], weights['pos_embed'])


def test_patches_of_another_size_are_resampled():
    """An enlarged patch gives what the patch itself gave."""
    model, small = build((32, 48), patch_size=(16, 24)), build(16, patch_size=8)
    model.load_state_dict(small.state_dict())
    patch = torch.rand(1, 3, 8, 8)
    enlarged = F.interpolate(patch, (16, 24), mode='bicubic', antialias=True)
    torch.testing.assert_close(model.patch_embed(enlarged), small.patch_embed(patch), rtol=0, atol=1e-5)
    assert model.strides == ((16, 24),) and model(torch.rand(1, 3, 30, 30))[0].shape[2:] == (2, 2)


def test_windows_have_no_place_for_registers():
    weights = build(64, num_register_tokens=2).state_dict()
    arch = dict(VIT_ARCH, num_layers=1)
    model = PlainViT(arch, img_size=64, **dict(VITDET, use_rel_pos=False, global_attn_indexes=()))
    model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match='reg_token'):
        build(64).load_state_dict(weights)


@pytest.mark.parametrize(
    'kwargs, own, message',
    [
        (dict(num_register_tokens=2), {}, 'belong to num_register_tokens=2, the model has num_register_tokens=0'),
        (dict(pos_type='rope'), {}, "belong to pos_type='rope', the model has pos_type='learned'"),
        (dict(pos_type='rope', rope_type='sbb'), {}, "belong to .*rope_type='sbb', the model .*rope_type='dinov3'"),
        (dict(ffn_type='swiglu'), {}, "belong to ffn_type='swiglu', the model has ffn_type='mlp'"),
        (dict(in_channels=4), {}, 'belong to in_channels=4, the model has in_channels=3'),
        ({}, dict(pre_norm=True), 'belong to pre_norm=False, the model has pre_norm=True'),
        ({}, dict(arch=dict(VIT_ARCH, num_layers=1, num_heads=4)), 'belong to num_heads=3, the model has num_heads=4'),
        (dict(arch=VIT_ARCH), {}, "belong to arch=.*'num_layers': 4.*, the model has arch=.*'num_layers': 1.*"),
    ],
)
def test_weights_of_other_options_are_refused(tmp_path, kwargs, own, message):
    """Files tell it through init_cfg and, in the names of the model, through load_from and the inferencers."""
    weights = build(64, **kwargs).state_dict()
    save(weights, tmp_path / 'a.pth')
    model = build(64, **own)
    with pytest.raises(CheckpointError, match=f'^{tmp_path}/a.pth: the weights {message}$'):
        load_pretrained(model, str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match=f'^the weights {message}$'):
        checkpoint.load_state_dict(model, weights)


def test_variants_of_other_sizes_are_named():
    with torch.device('meta'):
        model = PlainViT('large', layer_scale_init_value=1e-5)
        giant, tiny = PlainViT('giant', layer_scale_init_value=1e-5, ffn_type='swiglu'), PlainViT('tiny')
    large = r'the model has arch=.large. \(24 blocks of 1024 channels, MLPs of 4096\)'
    message = rf'belong to arch=.giant. \(40 blocks of 1536 channels, MLPs of 4096\), ffn_type=.swiglu., {large}'
    with pytest.raises(ValueError, match=message):
        model.check_compatible(convert(giant.state_dict()))
    # Weights that have exactly the names of the model, without metadata
    model = PlainViT(dict(embed_dims=96, num_layers=12, num_heads=3, mlp_ratio=1))
    with pytest.raises(CheckpointError, match=r'belong to arch=.tiny. \(12 blocks of 192 channels, MLPs of 768\), the'):
        checkpoint.load_state_dict(model, dict(tiny.state_dict()))


def test_heads_are_checked_by_load_state_dict():
    other = build(64, arch=dict(VIT_ARCH, num_layers=1, num_heads=4))
    with pytest.raises(RuntimeError, match='the weights belong to num_heads=3, the model has num_heads=4'):
        other.load_state_dict(build(64).state_dict())
    other.load_state_dict(dict(build(64).state_dict()))  # without metadata nothing tells the heads


def test_assumed_heads_are_a_warning(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(vit, 'print_log', lambda line, logger, level=logging.INFO: lines.append((line, level)))
    torch.save(dict(build(64).state_dict()), tmp_path / 'a.pth')  # without metadata
    load_pretrained(build(64), str(tmp_path / 'a.pth'))
    message = 'PlainViT: the weights belong to num_heads=1, which is assumed; the model has num_heads=3'
    assert lines == [(message, logging.WARNING)]


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(VITDET, window_size=0, global_attn_indexes=()),
        dict(VITDET, global_attn_indexes=()),
        dict(VITDET, rel_pos_scaled=True),
        dict(out_type='avg_featmap'),
        dict(pos_type='learned+rope', rope_type='pe', pre_norm=True, final_norm=False),
        dict(pos_type='rope', rope_type='sbb'),
        dict(pos_type='rope', rope_type='axial'),
    ],
)
def test_own_weights_tell_their_model(kwargs):
    """Tables of one length do not tell windows, and no shape tells the scale of relative scores."""
    torch.manual_seed(0)
    model = PlainViT(VIT_ARCH, img_size=64, **kwargs).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    result = convert(model.state_dict())
    assert result.source == 'mmvitzoo' and not result.assumed and not result.dropped
    other = MODELS.build(result.backbone_cfg).eval()
    other.load_state_dict(result.backbone)
    x = torch.randn(1, 3, 160, 128)
    assert torch.equal(other(x)[0], model(x)[0])


def test_names_shared_with_another_source_are_no_proof():
    """Most names of timm's DINOv3 are ours, and the others decide."""
    theirs = timm.create_model('vit_small_patch16_dinov3_qkvb', depth=1).eval()
    arch = dict(embed_dims=384, num_layers=1, num_heads=6, mlp_ratio=4)
    kwargs = dict(norm_eps=1e-5, layer_scale_init_value=1e-5, num_register_tokens=4)
    model = PlainViT(arch, pos_type='rope', **kwargs).eval()
    checkpoint.load_state_dict(model, theirs.state_dict())
    x = torch.randn(1, 3, 64, 96)
    expected = theirs.forward_features(x)[:, 5:].transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="belong to pos_type='rope', the model has pos_type='learned'"):
        checkpoint.load_state_dict(PlainViT(arch, **kwargs), theirs.state_dict())
    with pytest.raises(CheckpointError, match="belong to rope_type='dinov3', the model has rope_type='axial'"):
        checkpoint.load_state_dict(PlainViT(arch, pos_type='rope', rope_type='axial', **kwargs), theirs.state_dict())
    # Norms of queries and keys change the meaning of all other weights.
    foreign = {**build(64).state_dict(), 'blocks.0.attn.q_norm.weight': torch.ones(16)}
    with pytest.raises(CheckpointError, match='q_norm'):
        checkpoint.load_state_dict(build(64), foreign)
