"""Recognizing layouts and renaming keys, for all families."""

from pathlib import Path

import pytest
import torch
from forms import slim
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvitzoo.checkpoints import CheckpointError, convert, export
from mmvitzoo.checkpoints.layouts import LAYOUTS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope='module')
def official(load_golden):
    return load_golden('mpvit_tiny_official').state_dict


def under(prefix, state_dict):
    return {prefix + key: value for key, value in state_dict.items() if not key.startswith('cls_head')}


def test_official_classifier(official):
    converted = convert(official)
    assert (converted.family, converted.source, converted.arch) == ('mpvit', 'official', 'tiny')
    assert converted.backbone_cfg == dict(type='MPViT', arch='tiny')
    assert torch.equal(converted.state_dict['head.fc.weight'], official['cls_head.cls.weight'])
    assert {key.split('.')[0] for key in converted.state_dict} == {'backbone', 'head'}
    # Every key is renamed or has a reason: 14 copies in each of 23 blocks.
    assert len(converted.state_dict) + len(converted.dropped) == len(official)
    assert len(converted.dropped) == 14 * 23
    copy = 'mhca_stages.0.mhca_blks.0.MHCA_layers.0.cpe.proj.weight'
    assert converted.dropped[copy] == 'equal copy of a shared tensor'


def test_mmsegmentation_0_backbone_and_heads(official):
    state_dict = under('backbone.', official)
    state_dict['decode_head.conv_seg.weight'] = torch.ones(1)
    state_dict['auxiliary_head.convs.0.bn.running_mean'] = torch.ones(1)
    converted = convert(state_dict)
    assert (converted.source, converted.arch) == ('mmseg0', 'tiny')
    assert_same_backbone(converted, official)
    assert 'decode_head.conv_seg.weight' in converted.state_dict
    assert 'auxiliary_head.convs.0.bn.running_mean' in converted.state_dict


def test_mmsegmentation_0_segmentor_fits_its_config():
    """The heads have the same names in MMSegmentation 0 and 1."""
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


def test_own_names_are_unchanged(official):
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


def test_one_name_of_a_shared_tensor_suffices(official):
    """safetensors keeps the first of its names only."""
    shared = [key for key in official if '.cpe.' in key or '.crpe.' in key]
    kept = [key for key in shared if '.MHCA_layers.0.cpe.' in key or '.MHCA_layers.0.crpe.' in key]
    dropped = set(shared) - set(kept)
    converted = convert({key: value for key, value in official.items() if key not in dropped})
    assert not converted.dropped
    MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)


def test_copies_of_a_shared_tensor_must_be_equal(official):
    key = 'mhca_stages.1.mhca_blks.2.MHCA_layers.1.factoratt_crpe.crpe.conv_list.0.weight'
    with pytest.raises(CheckpointError, match='one shared tensor, but differ') as error:
        convert({**official, key: official[key] + 1})
    assert key in str(error.value)


def test_unknown_keys_are_refused(official):
    with pytest.raises(CheckpointError, match='mpvit/official has no rule for 2 keys: extra.a, extra.b'):
        convert({**official, 'extra.a': torch.zeros(1), 'extra.b': torch.zeros(1)})


def test_missing_weight_is_named(official):
    incomplete = {key: value for key, value in official.items() if not key.endswith('mlp.fc1.weight')}
    message = r'mpvit/official: no config .*: stages.0.paths.0.blocks.0.mlp.fc1.weight is missing'
    with pytest.raises(CheckpointError, match=message):
        convert(incomplete)


def test_unknown_layout_lists_the_known_ones():
    state_dict = {f'layers.{i}.weight': torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match='mpvit/official, mpvit/detectron2, mpvit/mmseg0') as error:
        convert(state_dict)
    assert 'layers.0.weight, layers.1.weight' in str(error.value)


def test_path_is_no_state_dict():
    with pytest.raises(CheckpointError, match="state_dict is a dict of tensors, got 'a.pth'; checkpoints.load reads a"):
        convert('a.pth')


def test_family_and_source_restrict_the_layouts(official):
    assert convert(official, family='mpvit', source='official').source == 'official'
    with pytest.raises(CheckpointError, match='no layout swin/'):
        convert(official, family='swin')
    with pytest.raises(CheckpointError, match='fit no mpvit/detectron2 layout'):
        convert(official, family='mpvit', source='detectron2')


@pytest.mark.parametrize('form', ['mpvit', 'scalablevit'])
def test_early_stages_of_an_unpublished_variant_are_refused(form):
    """The later stages are known of published variants only."""
    model = slim(form, out_indices=(0, 1))
    with pytest.raises(CheckpointError, match=f'{form}/mmvitzoo: no config .* 2 stages, and stages.2 is missing'):
        convert(model.state_dict())


def test_early_stages_of_a_published_variant():
    with torch.device('meta'):
        model = MODELS.build(dict(type='MPViT', arch='small', out_indices=(1,)))
        converted = convert(model.state_dict())
        assert converted.backbone_cfg == dict(type='MPViT', arch='small', out_indices=(0, 1))
        MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)


@pytest.mark.parametrize('name', ['MPViT', 'MViTv2', 'ScalableViT', 'PlainViT', 'ViTAE'])
def test_published_variants_are_recognized(name):
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
def test_config_of_a_detector_is_inferred(name):
    """Except initialization, regularization and the kind of norm."""
    config = Config.fromfile(ROOT / f'configs/{name}.py').model.backbone
    config = {key: value for key, value in config.items() if key not in ('init_cfg', 'drop_path_rate', 'norm_cfg')}
    with torch.device('meta'):
        assert config == convert(MODELS.build(config).state_dict()).backbone_cfg


@pytest.mark.parametrize('family', ['mpvit', 'mvitv2', 'scalablevit', 'vitae', 'plainvit'])
def test_tables_never_swap_queries_keys_and_values(family):
    """A part of a key that names one of them is on both sides of a table."""
    names = {'q_bias', 'v_bias', 'rel_pos_h', 'rel_pos_w', 'qkv', 'kqv', 'kv'}
    names |= {f'{prefix}{name}' for prefix in ('', 'pool_', 'norm_') for name in 'qkv'}
    found = 0
    for layout in LAYOUTS:
        rules = [(theirs, ours) for theirs, ours in layout.table.items() if isinstance(ours, str)]
        for theirs, ours in rules if layout.family == family else ():
            parts, named = (names.intersection(key.split('.')) for key in (theirs, ours))
            found += len(parts)
            assert parts == named or not parts, (layout.source, theirs)
    assert found


def test_misshapen_weight_is_named_with_its_shape(official):
    key = 'mhca_stages.0.mhca_blks.0.MHCA_layers.0.mlp.fc1.weight'
    message = r'stages.0.paths.0.blocks.0.mlp.fc1.weight has shape \(3,\), expected 2 dimensions'
    with pytest.raises(CheckpointError, match=f'mpvit/official: no config can be inferred .*{message}'):
        convert({**official, key: torch.zeros(3)})


@pytest.mark.parametrize(
    'form, source, theirs, extra',
    [
        ('mvitv2', 'timm', 'stages.2.blocks.0.shortcut_proj_attn.weight', 'stages.2.blocks.0.shortcut_proj_mlp.weight'),
        ('vitae', 'vitae-repository', 'backbone.blocks.1.attn.q_bias', 'backbone.blocks.1.attn.qkv.bias'),
    ],
)
def test_two_sources_of_one_weight_are_refused(form, source, theirs, extra):
    """Several original keys may become one of ours; none is dropped silently."""
    converted = convert(slim(form, (3,)).state_dict())
    weights = export(converted.state_dict, converted.family, source)
    if theirs not in weights:
        q, _, v = weights.pop(extra).chunk(3)
        weights.update({theirs: q, theirs.replace('q_bias', 'v_bias'): v})
    assert convert(weights).state_dict.keys() == converted.state_dict.keys()
    with pytest.raises(CheckpointError, match=f'{form}/{source}: .* is there (twice|beside)'):
        convert({**weights, extra: torch.zeros(3)})


def test_unpublished_variant():
    arch = dict(num_paths=(2, 1, 3, 1), num_layers=(1, 2, 1, 1), embed_dims=(16, 24, 32, 40), mlp_ratios=(2, 3, 2, 1.5))
    model = MODELS.build(dict(type='MPViT', arch=arch))
    converted = convert(model.state_dict())
    assert converted.arch == arch
    MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)


def test_assumed_arguments_are_named(official):
    """Shapes of MPViT and of relative positions tell everything; those of a plain classifier do not tell the heads."""
    assert convert(official).assumed == {} and convert(official).description == 'tiny'
    plain, vitdet = (convert(dict(slim(form).state_dict())) for form in ('vit', 'vitdet'))  # without metadata
    assert plain.assumed == dict(num_heads=1) and plain.description.endswith(', num_heads=1 (assumed)')
    assert vitdet.assumed == {} and vitdet.arch['num_heads'] == 3
    assert convert(slim('mvitv2', (3,)).state_dict()).assumed == dict(window_attention=False)
    assert set(convert(slim('scalablevit').state_dict()).assumed) == {'num_heads', 'window_size', 'channel_ratios'}
    with torch.device('meta'):
        model = MODELS.build(dict(type='PlainViT', arch='tiny', img_size=(64, 96)))
    assert convert(dict(model.state_dict())).description == 'tiny, num_heads=3 (assumed), img_size=(64, 96) (assumed)'
    assert convert(model.state_dict()).description == 'tiny'


@pytest.mark.parametrize('form', ['mvitv2', 'vit'])
def test_unknown_backbone_key_in_a_whole_model_is_refused(form):
    """Frameworks around timm's or the authors' models write keys like ours, and others that change their meaning."""
    weights = {f'backbone.{key}': x for key, x in slim(form).state_dict().items()}
    weights['head.fc.weight'] = torch.zeros(3)
    assert convert(weights).source == 'mmvitzoo'
    with pytest.raises(CheckpointError, match="backbone.blocks.0.attn.q_norm.weight is no weight of this package's"):
        convert({**weights, 'backbone.blocks.0.attn.q_norm.weight': torch.zeros(3)})
