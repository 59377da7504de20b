"""Recognising and renaming: every layout of every family."""

from pathlib import Path

import pytest
import torch
from forms import slim
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvitzoo.checkpoints import CheckpointError, convert, export
from mmvitzoo.checkpoints.conversion import LAYOUTS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope='module')
def official(load_golden):
    return load_golden('mpvit_tiny_official').state_dict


def under(prefix, state_dict):
    return {prefix + key: value for key, value in state_dict.items() if not key.startswith('cls_head')}


def test_official(official):
    converted = convert(official)
    assert (converted.family, converted.source, converted.arch) == ('mpvit', 'official', 'tiny')
    assert converted.backbone_cfg == dict(type='MPViT', arch='tiny')
    assert torch.equal(converted.state_dict['head.fc.weight'], official['cls_head.cls.weight'])
    assert {key.split('.')[0] for key in converted.state_dict} == {'backbone', 'head'}
    # Every key went somewhere or is accounted for: 14 copies in each of 23 blocks.
    assert len(converted.state_dict) + len(converted.dropped) == len(official)
    assert len(converted.dropped) == 14 * 23
    copy = 'mhca_stages.0.mhca_blks.0.MHCA_layers.0.cpe.proj.weight'
    assert converted.dropped[copy] == 'equal copy of a shared tensor'


def test_mmsegmentation_0(official):
    state_dict = under('backbone.', official)
    state_dict['decode_head.conv_seg.weight'] = torch.ones(1)
    state_dict['auxiliary_head.convs.0.bn.running_mean'] = torch.ones(1)
    converted = convert(state_dict)
    assert (converted.source, converted.arch) == ('mmseg0', 'tiny')
    assert_same_backbone(converted, official)
    assert 'decode_head.conv_seg.weight' in converted.state_dict
    assert 'auxiliary_head.convs.0.bn.running_mean' in converted.state_dict


def test_whole_segmentor_of_mmsegmentation_0():
    """Its heads have kept their names: with the backbone's they are those of our config."""
    config = Config.fromfile(ROOT / 'configs/mpvit/mpvit-small_upernet_8xb2-160k_ade20k-512x512.py')
    config.model.backbone.pop('init_cfg')
    init_default_scope('mmseg')
    with torch.device('meta'):
        weights = MODELS.build(config.model).state_dict()
    heads = {key: x for key, x in weights.items() if 'head' in key.split('.')[0]}
    names = ('decode_head.psp_modules.3.1.conv.weight', 'decode_head.fpn_bottleneck.bn.running_var')
    assert {*names, 'decode_head.lateral_convs.2.bn.bias', 'auxiliary_head.conv_seg.weight'} <= heads.keys()
    ours = {key: x for key, x in weights.items() if key.startswith('backbone.')}
    theirs = under('backbone.', export(ours, 'mpvit', 'official'))
    converted = convert({**theirs, **heads})
    assert (converted.source, converted.arch) == ('mmseg0', 'small')
    assert converted.state_dict.keys() == weights.keys()
    assert all(value is weights[key] for key, value in converted.state_dict.items())


def test_ours_stays_as_it_is(official):
    converted = convert(official)
    again = convert(converted.state_dict)
    bare = convert(converted.backbone)
    assert again.source == bare.source == 'mmvitzoo'
    assert again.state_dict.keys() == converted.state_dict.keys()
    assert bare.backbone.keys() == converted.backbone.keys()


def assert_same_backbone(converted, official):
    expected = convert(official).backbone
    assert converted.backbone.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in converted.backbone.items())


def test_copies_alone_suffice(official):
    """safetensors keeps one of the names of a shared tensor, whichever comes first."""
    shared = [key for key in official if '.cpe.' in key or '.crpe.' in key]
    kept = [key for key in shared if '.MHCA_layers.0.cpe.' in key or '.MHCA_layers.0.crpe.' in key]
    dropped = set(shared) - set(kept)
    converted = convert({key: value for key, value in official.items() if key not in dropped})
    assert not converted.dropped
    MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)


def test_copies_must_agree(official):
    key = 'mhca_stages.1.mhca_blks.2.MHCA_layers.1.factoratt_crpe.crpe.conv_list.0.weight'
    with pytest.raises(CheckpointError, match='one shared tensor, but differ') as error:
        convert({**official, key: official[key] + 1})
    assert key in str(error.value)


def test_unknown_keys_in_a_known_layout(official):
    with pytest.raises(CheckpointError, match='mpvit/official has no rule for 2 keys: extra.a, extra.b'):
        convert({**official, 'extra.a': torch.zeros(1), 'extra.b': torch.zeros(1)})


def test_weights_that_tell_the_variant_are_missing(official):
    incomplete = {key: value for key, value in official.items() if not key.endswith('mlp.fc1.weight')}
    with pytest.raises(
        CheckpointError, match='mpvit/official with missing .* stages.0.paths.0.blocks.0.mlp.fc1.weight'
    ):
        convert(incomplete)


def test_unknown_layout():
    state_dict = {f'layers.{i}.weight': torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match='mpvit/official, mpvit/detectron2, mpvit/mmseg0') as error:
        convert(state_dict)
    assert 'layers.0.weight, layers.1.weight' in str(error.value)


def test_family_and_source_restrict(official):
    assert convert(official, family='mpvit', source='official').source == 'official'
    with pytest.raises(CheckpointError, match='no layout swin/'):
        convert(official, family='swin')
    with pytest.raises(CheckpointError, match='fit no mpvit/detectron2 layout'):
        convert(official, family='mpvit', source='detectron2')


@pytest.mark.parametrize('form', ['mpvit', 'scalablevit'])
def test_early_stages_of_no_published_variant(form):
    """What the later stages would be is known of published ones only."""
    model = slim(form, out_indices=(0, 1))
    with pytest.raises(CheckpointError, match=f'{form}/mmvitzoo with missing .* stages.2'):
        convert(model.state_dict())


def test_early_stages_alone():
    with torch.device('meta'):
        model = MODELS.build(dict(type='MPViT', arch='small', out_indices=(1,)))
        converted = convert(model.state_dict())
        assert converted.backbone_cfg == dict(type='MPViT', arch='small', out_indices=(0, 1))
        MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)


@pytest.mark.parametrize('name', ['MPViT', 'MViTv2', 'ScalableViT', 'PlainViT', 'ViTAE'])
def test_published_variants_are_recognised(name):
    for arch in MODELS.get(name).arch_zoo:
        with torch.device('meta'):
            weights = MODELS.build(dict(type=name, arch=arch)).state_dict()
            converted = convert(weights)
            assert (converted.family, converted.source, converted.arch) == (name.lower(), 'mmvitzoo', arch)
            again = MODELS.build(converted.backbone_cfg).state_dict()
        assert {key: x.shape for key, x in again.items()} == {key: x.shape for key, x in weights.items()}


@pytest.mark.parametrize(
    'name', ['mpvit/mask-rcnn_mpvit-tiny_fpn_1x_coco', 'mvitv2/mask-rcnn_mvitv2-tiny_fpn_ms-3x_coco']
)
def test_checkpoint_tells_what_a_config_says(name):
    """All but what initialises and regularises the backbone, and the kind of norm."""
    config = Config.fromfile(ROOT / f'configs/{name}.py').model.backbone
    config = {key: value for key, value in config.items() if key not in ('init_cfg', 'drop_path_rate', 'norm_cfg')}
    with torch.device('meta'):
        assert config == convert(MODELS.build(config).state_dict()).backbone_cfg


@pytest.mark.parametrize('family', ['mpvit', 'mvitv2', 'scalablevit', 'vitae', 'plainvit'])
def test_tables_keep_queries_keys_and_values_apart(family):
    """A part of a key that says which of them it is stands on both sides of a table."""
    names = {'q_bias', 'v_bias', 'rel_pos_h', 'rel_pos_w', 'qkv', 'kqv', 'kv'}
    names |= {f'{kind}{name}' for kind in ('', 'pool_', 'norm_') for name in 'qkv'}
    found = 0
    for layout in LAYOUTS:
        rules = [(theirs, ours) for theirs, ours in layout.table.items() if isinstance(ours, str)]
        for theirs, ours in rules if layout.family == family else ():
            parts, named = (names.intersection(key.split('.')) for key in (theirs, ours))
            found += len(parts)
            assert parts == named or not parts, (layout.source, theirs)
    assert found


def test_misshapen_weights(official):
    key = 'mhca_stages.0.mhca_blks.0.MHCA_layers.0.mlp.fc1.weight'
    with pytest.raises(CheckpointError, match='mpvit/official with missing or misshapen weights'):
        convert({**official, key: torch.zeros(3)})


@pytest.mark.parametrize(
    'form, source, theirs, extra',
    [
        ('mvitv2', 'timm', 'stages.2.blocks.0.shortcut_proj_attn.weight', 'stages.2.blocks.0.shortcut_proj_mlp.weight'),
        ('vitae', 'vitae-repository', 'backbone.blocks.1.attn.q_bias', 'backbone.blocks.1.attn.qkv.bias'),
    ],
)
def test_two_weights_for_one(form, source, theirs, extra):
    """Where several of theirs become one of ours, none is dropped silently."""
    converted = convert(slim(form, (3,)).state_dict())
    weights = export(converted.state_dict, converted.family, source)
    if theirs not in weights:
        q, _, v = weights.pop(extra).chunk(3)
        weights.update({theirs: q, theirs.replace('q_bias', 'v_bias'): v})
    assert convert(weights).state_dict.keys() == converted.state_dict.keys()
    with pytest.raises(CheckpointError, match=f'{form}/{source} .* is there (twice|beside)'):
        convert({**weights, extra: torch.zeros(3)})


def test_custom_arch():
    arch = dict(num_paths=(2, 1, 3, 1), num_layers=(1, 2, 1, 1), embed_dims=(16, 24, 32, 40), mlp_ratios=(2, 3, 2, 1.5))
    model = MODELS.build(dict(type='MPViT', arch=arch))
    converted = convert(model.state_dict())
    assert converted.arch == arch
    MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)
