"""Layouts of PlainViT and ViTAE, in both directions."""

import json
from pathlib import Path

import pytest
import torch
from detectron2_names import heads
from forms import VITAE, slim
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvitzoo.checkpoints import CheckpointError, convert, export, load_pretrained, save
from mmvitzoo.checkpoints.layouts import LAYOUTS
from mmvitzoo.checkpoints.layouts.vit import HUGGING_FACE
from mmvitzoo.models import PlainViT
from mmvitzoo.models.backbones import vit

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / 'configs' / 'vitdet'
GOLDEN = ROOT / 'tests' / 'data' / 'golden'
ARCH = dict(embed_dims=48, num_layers=4, num_heads=3, mlp_ratio=2.0)


def vitdet(**kwargs):
    torch.manual_seed(0)
    cfg = dict(
        type='PlainViT',
        arch=ARCH,
        img_size=96,
        pretrain_img_size=64,
        final_norm=False,
        with_cls_token=False,
        window_size=3,
        global_attn_indexes=(1, 3),
        use_rel_pos=True,
    )
    model = MODELS.build({**cfg, **kwargs})
    for name, value in model.named_parameters():
        if 'rel_pos' in name or 'residual' in name:
            torch.nn.init.normal_(value)
    return model


def timm_weights(arch='tiny'):
    torch.manual_seed(0)
    model = MODELS.build(dict(type='PlainViT', arch=arch))
    weights = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    weights.update({'head.fc.weight': torch.randn(7, 192), 'head.fc.bias': torch.randn(7)})
    return export(weights, 'plainvit', 'timm'), weights


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_timm_export_and_convert_are_inverse():
    timm, weights = timm_weights()
    assert {'cls_token', 'pos_embed', 'patch_embed.proj.weight', 'blocks.11.mlp.fc2.bias', 'head.weight'} <= set(timm)
    converted = convert(timm)
    assert_same(converted.state_dict, weights)
    assert_same(export(converted.state_dict, 'plainvit', 'timm'), timm)
    assert converted.backbone_cfg == dict(
        type='PlainViT', arch='tiny', with_cls_token=True, final_norm=True, img_size=224
    )


def test_masked_autoencoder():
    """MAE's encoder has timm's names; its decoder is dropped."""
    timm, weights = timm_weights()
    extra = ('mask_token', 'decoder_pos_embed', 'decoder_embed.weight', 'decoder_blocks.0.norm1.weight')
    converted = convert({**timm, **{key: torch.zeros(1) for key in extra}})
    assert_same(converted.state_dict, weights)
    assert {converted.dropped[key] for key in extra} == {'belongs to the decoder of masked autoencoding'}


def test_export_refuses_weights_that_timm_does_not_have():
    weights = {f'backbone.{key}': value for key, value in vitdet().state_dict().items()}
    with pytest.raises(CheckpointError, match='plainvit/timm has no name for 8 weights: backbone.blocks.0.attn.rel_'):
        export(weights, 'plainvit', 'timm')
    model = MODELS.build(dict(type='PlainViT', arch=ARCH, residual_block_indexes=(1,), with_cls_token=False))
    weights = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match='plainvit/timm has no name for 9 weights: backbone.blocks.1.residual'):
        export(weights, 'plainvit', 'timm')
    with pytest.raises(CheckpointError, match='no layout plainvit/tim; the layouts are'):
        export(weights, 'plainvit', 'tim')


def test_whole_cascade_of_detectron2(load_golden, tmp_path):
    """The detector for LVIS, with LayerNorm in its heads; Mask R-CNN is in test_detectron2_heads.py."""
    weights = {f'backbone.{key}': value for key, value in load_golden('vitdet_d2_small').state_dict.items()}
    weights.update(heads(('.0', '.1', '.2'), norm=('weight', 'bias')))
    weights['roi_heads.box_predictor.1.fed_loss_cls_weights'] = torch.ones(80)
    converted = convert(weights)
    assert converted.source == 'detectron2' and converted.backbone_cfg['pretrain_img_size'] == 224
    assert 'annotations' in converted.dropped.pop('roi_heads.box_predictor.1.fed_loss_cls_weights')
    reasons = {'is in the data preprocessor of the config', 'anchors follow from the config'}
    assert set(converted.dropped.values()) == {*reasons, 'position of a class token, which the model does not have'}
    config = Config.fromfile(CONFIGS / 'cascade-mask-rcnn_plainvit-base-mae_lsj-100e_coco.py')
    config.model.backbone = converted.backbone_cfg
    config.model.neck.in_channels = 96
    config.model.rpn_head.norm_cfg = None
    assert_fits(converted, config)
    ours, theirs = 'roi_head.bbox_head.1.shared_convs', 'roi_heads.box_head.1.conv'
    assert torch.equal(converted.state_dict[f'{ours}.2.conv.weight'], weights[f'{theirs}3.weight'])
    assert torch.equal(converted.state_dict[f'{ours}.0.ln.bias'], weights[f'{theirs}1.norm.bias'])
    save(converted.state_dict, tmp_path / 'a.safetensors')


@pytest.mark.parametrize('name', ['vitdet_vitae-repo_small', 'vitae_vitae-repo_small', 'vitae-s_vitae-repo'])
def test_whole_detector_of_the_vitae_repository(name):
    """Backbone with its pyramid, FPN and heads of MMDetection 2 fit the model of a config."""
    shapes = json.loads((GOLDEN / f'{name}.json').read_text())['keys']
    theirs = {f'backbone.{key}': torch.empty(shape, device='meta') for key, shape in shapes.items()}
    config = Config.fromfile(CONFIGS / 'mask-rcnn_vitae-base-mae_lsj-100e_coco.py')
    config.model.backbone = convert(theirs).backbone_cfg
    config.model.neck.in_channels = len(theirs['backbone.norm.weight'])
    heads = {
        key: value
        for key, value in meta_model(config).state_dict().items()
        if not key.startswith('backbone') and 'rescale' not in key
    }
    assert 'neck.lateral_convs.3.ln.weight' in heads and 'rpn_head.rpn_conv.1.ln.weight' in heads
    converted = convert({**theirs, **heads})
    assert converted.source == 'vitae-repository' and not converted.dropped
    assert_fits(converted, config)
    assert converted.state_dict['neck.rescale.0.3.weight'] is theirs['backbone.fpn1.3.weight']


def meta_model(config):
    init_default_scope('mmdet')
    with torch.device('meta'):
        return MODELS.build(config.model)


def assert_fits(converted, config):
    expected = {key: value.shape for key, value in meta_model(config).state_dict().items()}
    assert {key: value.shape for key, value in converted.state_dict.items()} == expected


def test_vitae_biases_of_queries_and_values_are_joined():
    """In global blocks keys have no bias, for which zeros stand."""
    theirs = {key.replace('.pcm.', '.PCM.'): value for key, value in slim('vitae').state_dict().items()}
    full = torch.arange(3 * 48.0)
    del theirs['blocks.1.attn.qkv.bias']
    theirs.update({'blocks.1.attn.q_bias': full[:48], 'blocks.1.attn.v_bias': full[96:]})
    converted = convert({**theirs, 'cls_token': torch.zeros(1, 1, 48), 'head.weight': torch.zeros(1000, 48)})
    bias = converted.backbone['blocks.1.attn.qkv.bias']
    assert torch.equal(bias[:48], full[:48]) and torch.equal(bias[96:], full[96:]) and not bias[48:96].any()
    assert converted.arch == VITAE and set(converted.dropped) == {'cls_token', 'head.weight'}
    assert converted.backbone_cfg['img_size'] == (96, 96)


def test_vitae_classifier_with_names_of_cells():
    """ViTAE-B is also published with cells instead of blocks."""
    with torch.device('meta'):
        backbone = MODELS.build(dict(type='ViTAE', arch='base', img_size=224)).state_dict()
    backbone = {key: value for key, value in backbone.items() if 'rel_pos' not in key}
    names = {'patch_embed.proj': 'layers.0.RC.PRM.proj', '.pcm.': '.PCM.', 'blocks.': 'layers.2.NC.'}
    theirs = {}
    for key, value in backbone.items():
        for ours, name in names.items():
            key = key.replace(ours, name)
        theirs[key] = value
    del theirs['pos_embed']
    theirs['layers.0.RC.cls_token'] = torch.zeros(1, 1, 768)
    theirs['layers.0.RC.pos_embed'] = torch.cat([torch.zeros(1, 1, 768), torch.ones(1, 14 * 14, 768)], 1)
    converted = convert(theirs)
    assert (converted.family, converted.arch) == ('vitae', 'base')
    weights = converted.backbone
    assert weights.keys() == backbone.keys()
    assert torch.equal(weights.pop('pos_embed'), torch.ones(1, 14 * 14, 768))
    assert all(value is backbone[key] for key, value in weights.items())


def test_vitae_is_not_taken_for_a_plain_vit():
    """Its blocks have all weights of PlainViT's, and more."""
    with torch.device('meta'):
        weights = MODELS.build(dict(type='ViTAE', arch='base', img_size=224)).state_dict()
    with pytest.raises(CheckpointError, match=r'the keys fit no plainvit/\* layout, but vitae/mmvitzoo'):
        convert(weights, family='plainvit')


@pytest.mark.parametrize('dim, heads', [(48, 3), (224, 7)])
def test_unpublished_width_loads_its_own_weights(tmp_path, dim, heads):
    cfg = dict(type='PlainViT', arch=dict(ARCH, embed_dims=dim, num_heads=heads), img_size=64)
    model = MODELS.build(cfg)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    load_pretrained(MODELS.build(cfg), str(tmp_path / 'a.pth'))
    bare = dict(cfg, with_cls_token=False, residual_block_indexes=(0,))
    torch.save(MODELS.build(bare).state_dict(), tmp_path / 'b.pth')
    load_pretrained(MODELS.build(bare), str(tmp_path / 'b.pth'))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(pos_type='rope', rope_type='axial'),
        dict(pos_type='rope', rope_type='pe'),
        dict(with_cls_token=False, window_size=2, use_rel_pos=True, rel_pos_scaled=True),
        dict(norm_eps=1e-5, act='quick_gelu'),
    ],
)
def test_guesses_about_a_file_without_metadata_refuse_nothing(kwargs, tmp_path, monkeypatch):
    model = PlainViT(ARCH, img_size=64, **kwargs)
    torch.save(dict(model.state_dict()), tmp_path / 'a.pth')
    again = PlainViT(ARCH, img_size=64, **kwargs)
    lines = []
    monkeypatch.setattr(vit, 'print_log', lambda line, **kwargs: lines.append(line))
    load_pretrained(again, str(tmp_path / 'a.pth'))
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values()))
    differences = [x for x in lines if 'the weights belong to' in x]
    assert all('which is assumed' in x for x in differences) and bool(differences) == ('rel_pos_scaled' not in kwargs)


@pytest.mark.parametrize(
    'family, source, key',
    [
        ('plainvit', 'vitae-repository', 'backbone.blocks.0.attn.rel_pos_h'),
        ('mpvit', 'detectron2', 'bbox_head.retina_cls.weight'),
        ('mvitv2', 'detectron2', 'bbox_head.retina_reg.bias'),
    ],
)
def test_export_undoes_changes_of_values(family, source, key):
    layout = next(x for x in LAYOUTS if (x.family, x.source) == (family, source))
    value = torch.randn(27, 64) if 'rel_pos' in key else torch.randn(36, 4)
    state_dict = {key: value}
    layout.postprocess(state_dict, {})
    assert not torch.equal(state_dict[key], value)
    (exported,) = export(state_dict, family, source).values()
    assert torch.equal(exported, value)


def test_folded_scale_is_exact_for_heads_of_64():
    model = vitdet(arch=dict(ARCH, embed_dims=192), final_norm=True, pretrain_img_size=None)
    theirs = {**model.state_dict(), 'fpn1.0.weight': torch.zeros(192, 192, 2, 2)}
    converted = convert(theirs)
    tables = {key: value for key, value in converted.backbone.items() if 'rel_pos' in key}
    assert len(tables) == 8 and all(torch.equal(8 * value, theirs[key]) for key, value in tables.items())


def test_hugging_face_vitdet():
    """transformers' VitDetModel."""
    model = vitdet(residual_block_indexes=(1,))
    theirs = {key.replace('patch_embed.proj', 'embeddings.projection'): v for key, v in model.state_dict().items()}
    theirs = {key.replace('blocks.', 'encoder.layer.').replace('.attn.', '.attention.'): v for key, v in theirs.items()}
    for i, name in enumerate(('conv1', 'norm1', None, 'conv2', 'norm2', None, 'conv3', 'norm3')):
        theirs = {key.replace(f'.residual.{i}.', f'.residual.{name}.'): value for key, value in theirs.items()}
    positions = theirs.pop('pos_embed')
    theirs['embeddings.position_embeddings'] = torch.cat([torch.zeros(1, 1, 48), positions], 1)
    assert 'encoder.layer.1.residual.conv3.weight' in theirs and len(HUGGING_FACE) == 14
    converted = convert(theirs)
    assert converted.source == 'huggingface'
    assert_same(converted.backbone, dict(model.state_dict()))
    assert converted.arch == ARCH and converted.backbone_cfg['residual_block_indexes'] == [1]


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(img_size=(96, 128)),
        dict(residual_block_indexes=(0, 2)),
        dict(global_attn_indexes=(), residual_block_indexes=(3,)),
        dict(patch_size=8, img_size=96, pretrain_img_size=96, final_norm=True),
        dict(img_size=48),  # all tables have one size
        dict(window_size=4, global_attn_indexes=(0, 1, 2)),  # most blocks are global
        dict(global_attn_indexes=(1, 3), out_indices=(1,)),
    ],
)
def test_arguments_are_inferred(kwargs):
    model = vitdet(**kwargs)
    converted = convert(model.state_dict())
    assert converted.source == 'mmvitzoo'
    again = MODELS.build(converted.backbone_cfg).eval()
    again.load_state_dict(converted.backbone, strict=True)
    x = torch.randn(1, 3, 80, 112)
    with torch.no_grad():
        torch.testing.assert_close(again(x)[0], model.eval()(x)[0], atol=1e-6, rtol=1e-5)


def test_mixed_rotary_frequencies_of_early_blocks():
    whole = PlainViT(ARCH, img_size=32, pos_type='rope', rope_type='mixed')
    early = PlainViT(ARCH, img_size=32, pos_type='rope', rope_type='mixed', out_indices=(1,))
    early.load_state_dict(whole.state_dict(), strict=False)
    result = convert(early.state_dict())
    again = MODELS.build(result.backbone_cfg).eval()
    again.load_state_dict(result.backbone, strict=True)
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(again(x)[0], early.eval()(x)[0])


def test_classifier_initializes_a_detector(tmp_path):
    """The missing weights are new, the class token is dropped, and positions are resized."""
    timm, weights = timm_weights()
    save(timm, tmp_path / 'vit.safetensors')
    arch = dict(type='PlainViT', arch='tiny', with_cls_token=False, window_size=14, global_attn_indexes=(2, 5, 8, 11))
    model = MODELS.build(dict(arch, img_size=320, use_rel_pos=True, residual_block_indexes=(11,)))
    load_pretrained(model, str(tmp_path / 'vit.safetensors'))
    assert torch.equal(model.blocks[3].mlp.fc1.weight, weights['backbone.blocks.3.mlp.fc1.weight'])
    assert model.pos_embed.shape == (1, 400, 192) and not model.blocks[2].attn.rel_pos_h.any()
    # A file with a part of the new weights is broken; it is no classifier.
    state = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    del state['backbone.blocks.11.residual.4.bias']
    torch.save(state, tmp_path / 'broken.pth')
    with pytest.raises(CheckpointError, match='lacks 1 weights of PlainViT: blocks.11.residual.4.bias'):
        load_pretrained(model, str(tmp_path / 'broken.pth'))


def test_relative_positions_for_scaled_queries_are_refused(tmp_path, load_golden):
    reference = load_golden('vitdet_d2_small')
    torch.save(reference.state_dict, tmp_path / 'a.pth')
    cfg = convert(reference.state_dict).backbone_cfg
    load_pretrained(MODELS.build(cfg), str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match='a.pth: relative positions .* converted for rel_pos_scaled=False'):
        load_pretrained(MODELS.build(dict(cfg, rel_pos_scaled=True)), str(tmp_path / 'a.pth'))


def test_own_positions_without_a_class_token_are_kept():
    """A grid of 2 x 5 has one position more than one of 3 x 3."""
    cfg = dict(type='PlainViT', arch=ARCH, img_size=(32, 80), with_cls_token=False)
    for kwargs, source in (({}, 'timm'), (dict(use_rel_pos=True), 'mmvitzoo')):
        result = convert(dict(MODELS.build({**cfg, **kwargs}).state_dict()))
        assert (result.source, result.backbone['pos_embed'].shape[1]) == (source, 10) and not result.dropped


def test_mmpretrain_head_after_a_hidden_layer_is_dropped():
    """The linear layer alone would compute something else."""
    timm, weights = timm_weights()
    theirs = export(weights, 'plainvit', 'mmpretrain')
    theirs['head.layers.pre_logits.weight'] = torch.zeros(192, 192)
    result = convert(theirs)
    heads = {f'head.layers.{name}' for name in ('head.weight', 'head.bias', 'pre_logits.weight')}
    assert result.dropped.keys() == heads and not any(key.startswith('head.') for key in result.state_dict)


def test_positions_without_patches_are_named():
    weights = {'conv_proj.weight': torch.zeros(8, 3, 16, 16), 'encoder.pos_embedding': torch.tensor(0.0)}
    for name in ('ln_1.weight', 'mlp.0.weight', 'mlp.3.weight', 'self_attention.in_proj_weight'):
        weights[f'encoder.layers.encoder_layer_0.{name}'] = torch.zeros((8, 8)[: 1 + ('ln' not in name)])
    with pytest.raises(CheckpointError, match=r'pos_embed has shape \(\), expected 3 dimensions'):
        convert(weights)
    weights['encoder.pos_embedding'], weights['class_token'] = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
    with pytest.raises(CheckpointError, match='pos_embed has no position of a patch'):
        convert(weights)


@pytest.mark.parametrize('width', [96, 128])
def test_encoder_of_segment_anything(width):
    """timm stores its positions as a map."""
    weights = vitdet(img_size=(96, width), pretrain_img_size=None).state_dict()
    positions = weights['pos_embed'].unflatten(1, (6, width // 16))
    theirs = {**weights, 'pos_embed': positions, 'neck.0.weight': torch.zeros(8, 48)}
    result = convert(theirs)
    assert result.source == 'timm-sam' and list(result.dropped) == ['neck.0.weight']
    assert_same(result.backbone, dict(weights))
    del theirs['neck.0.weight']
    assert_same(export(result.state_dict, 'plainvit', 'timm-sam'), theirs)
    assert_same(convert(theirs).backbone, dict(weights))
    result.state_dict['backbone.pos_embed'] = torch.zeros(1, 10, 48)
    with pytest.raises(CheckpointError, match='the map of 10 positions, which nothing tells'):
        export(result.state_dict, 'plainvit', 'timm-sam')


@pytest.mark.parametrize(
    'source, key, value, message',
    [
        ('detectron2', 'net.pos_embed', None, 'backbone.pos_embed is missing'),
        ('detectron2', 'net.pos_embed', torch.zeros(3), r'backbone.pos_embed has shape \(3,\), expected 3 dimensions'),
        ('mmvitzoo', 'pos_embed', torch.zeros(3, 3), r'has shape \(3, 3\), expected 3 or 4 dimensions'),
        (
            'mmvitzoo',
            'blocks.0.attn.rel_pos_h',
            torch.zeros(5, 7),
            'rel_pos_h belongs to heads of 7 channels, which do not divide 48',
        ),
        ('mmvitzoo', 'blocks.3.attn.rel_pos_w', None, 'blocks.3.attn.rel_pos_w is missing'),
        ('mmvitzoo', 'pos_embed', None, 'pos_embed is missing'),
    ],
)
def test_misshapen_or_missing_weight_is_named(source, key, value, message):
    prefix = 'net.' if source == 'detectron2' else ''
    weights = {prefix + name: x for name, x in vitdet().state_dict().items()}
    if value is None:
        del weights[key]
    else:
        weights[key] = value
    with pytest.raises(CheckpointError, match=f'plainvit/{source}: .*{message}'):
        convert(weights)
