"""Layouts of PlainViT and ViTAE, and the way back."""

import pytest
import torch
from detectron2_names import heads
from mmengine.registry import MODELS

from mmvitzoo.checkpoints import CheckpointError, convert, export, load_pretrained, save
from mmvitzoo.checkpoints.vit import HUGGING_FACE

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


def test_timm_and_back_is_the_identity():
    timm, weights = timm_weights()
    assert {'cls_token', 'pos_embed', 'patch_embed.proj.weight', 'blocks.11.mlp.fc2.bias', 'head.weight'} <= set(timm)
    converted = convert(timm)
    assert_same(converted.state_dict, weights)
    assert_same(export(converted.state_dict, 'plainvit', 'timm'), timm)
    assert converted.backbone_cfg == dict(
        type='PlainViT', arch='tiny', with_cls_token=True, final_norm=True, img_size=224
    )


def test_masked_autoencoder():
    """MAE's encoder is spelled as timm's; its decoder goes."""
    timm, weights = timm_weights()
    extra = ('mask_token', 'decoder_pos_embed', 'decoder_embed.weight', 'decoder_blocks.0.norm1.weight')
    converted = convert({**timm, **{key: torch.zeros(1) for key in extra}})
    assert_same(converted.state_dict, weights)
    assert {converted.dropped[key] for key in extra} == {'belongs to the decoder of masked autoencoding'}


def test_what_timm_has_no_name_for():
    weights = {f'backbone.{key}': value for key, value in vitdet().state_dict().items()}
    with pytest.raises(CheckpointError, match='plainvit/timm has no name for 8 weights: backbone.blocks.0.attn.rel_'):
        export(weights, 'plainvit', 'timm')
    with pytest.raises(CheckpointError, match='no layout plainvit/tim; known are'):
        export(weights, 'plainvit', 'tim')


def test_timm_with_parts_that_no_plain_vit_has():
    timm, _ = timm_weights()
    with pytest.raises(CheckpointError, match='plainvit/timm has no rule for 1 keys: blocks.0.ls1.gamma'):
        convert({**timm, 'blocks.0.ls1.gamma': torch.ones(192)})


def detectron2_detector(load_golden, stages=('',)):
    """A whole detector around a reference backbone, in the names and shapes of Detectron2."""
    weights = {f'backbone.{key}': value for key, value in load_golden('vitdet_d2_small').state_dict.items()}
    return {**weights, **heads(stages, norm=('weight', 'bias'))}


@pytest.mark.parametrize('cascade', [False, True])
def test_whole_detector_of_detectron2(load_golden, cascade):
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    weights = detectron2_detector(load_golden, stages=('.0', '.1', '.2') if cascade else ('',))
    converted = convert(weights)
    assert converted.source == 'detectron2' and converted.backbone_cfg['pretrain_img_size'] == 224
    reasons = {'is in the data preprocessor of the config', 'anchors follow from the config'}
    assert set(converted.dropped.values()) == {*reasons, 'position of a class token, which the model runs without'}
    name = 'cascade-mask-rcnn' if cascade else 'mask-rcnn'
    config = Config.fromfile(f'configs/vitdet/{name}_plainvit-base-mae_lsj-100e_coco.py')
    config.model.backbone = converted.backbone_cfg
    config.model.neck.in_channels = 96
    config.model.rpn_head.norm_cfg = None
    init_default_scope('mmdet')
    MODELS.build(config.model).load_state_dict(converted.state_dict, strict=True)
    box = 'roi_head.bbox_head.1' if cascade else 'roi_head.bbox_head'
    theirs = 'roi_heads.box_head.1' if cascade else 'roi_heads.box_head'
    assert torch.equal(converted.state_dict[f'{box}.shared_convs.2.conv.weight'], weights[f'{theirs}.conv3.weight'])
    assert torch.equal(converted.state_dict[f'{box}.shared_convs.0.ln.bias'], weights[f'{theirs}.conv1.norm.bias'])
    mask = converted.state_dict['roi_head.mask_head.convs.3.ln.bias']
    assert torch.equal(mask, weights['roi_heads.mask_head.mask_fcn4.norm.bias'])


@pytest.mark.parametrize('name', ['vitdet_vitae-repo_small', 'vitae_vitae-repo_small', 'vitae-s_vitae-repo'])
def test_whole_detector_of_the_vitae_repository(load_golden, name):
    """Backbone, the pyramid inside it, FPN and heads of MMDetection 2 go into a config strictly."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    reference = load_golden(name)
    backbone = convert(reference.state_dict).backbone_cfg
    config = Config.fromfile('configs/vitdet/mask-rcnn_vitae-base-mae_lsj-100e_coco.py')
    config.model.backbone = backbone
    config.model.neck.in_channels = MODELS.build(backbone).out_channels[0]
    init_default_scope('mmdet')
    model = MODELS.build(config.model)
    heads = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith('backbone') and 'rescale' not in key
    }
    assert 'neck.lateral_convs.3.ln.weight' in heads and 'rpn_head.rpn_conv.1.ln.weight' in heads
    converted = convert({**{f'backbone.{key}': value for key, value in reference.state_dict.items()}, **heads})
    assert converted.source == 'vitae-repository' and not converted.dropped
    model.load_state_dict(converted.state_dict, strict=True)
    level = reference.state_dict['fpn1.3.weight']
    assert torch.equal(model.neck.rescale[0][3].weight, level)


def test_keys_of_vitae_without_bias():
    """Queries and values have one each in global blocks; zeros stand for the keys'."""
    backbone = MODELS.build(dict(type='ViTAE', arch='base', img_size=320)).state_dict()
    theirs = {}
    for key, value in backbone.items():
        key = key.replace('stem.projection', 'patch_embed.proj').replace('stem.', '').replace('.pcm.', '.PCM.')
        theirs[key] = value
    full = torch.arange(3 * 768.0)
    del theirs['blocks.2.attn.qkv.bias']
    theirs.update({'blocks.2.attn.q_bias': full[:768], 'blocks.2.attn.v_bias': full[1536:]})
    converted = convert({**theirs, 'cls_token': torch.zeros(1, 1, 768), 'head.weight': torch.zeros(1000, 768)})
    bias = converted.backbone['blocks.2.attn.qkv.bias']
    assert torch.equal(bias[:768], full[:768]) and torch.equal(bias[1536:], full[1536:]) and not bias[768:1536].any()
    assert converted.backbone_cfg['arch'] == 'base' and set(converted.dropped) == {'cls_token', 'head.weight'}
    assert converted.backbone_cfg['img_size'] == (320, 320)


def test_vitae_in_cells():
    """Another spelling of ViTAE-B's classifier."""
    backbone = MODELS.build(dict(type='ViTAE', arch='base', img_size=224)).state_dict()
    spelling = {'stem.projection': 'layers.0.RC.PRM.proj', 'stem.': 'layers.0.RC.', '.pcm.': '.PCM.'}
    theirs = {}
    for key, value in backbone.items():
        for ours, name in {**spelling, 'blocks.': 'layers.2.NC.'}.items():
            key = key.replace(ours, name)
        if 'rel_pos' not in key:
            theirs[key] = value
    theirs['layers.0.RC.cls_token'] = torch.zeros(1, 1, 768)
    theirs['layers.0.RC.pos_embed'] = torch.cat([torch.zeros(1, 1, 768), backbone['stem.pos_embed']], 1)
    converted = convert(theirs)
    assert (converted.family, converted.arch) == ('vitae', 'base')
    expected = {key: value for key, value in backbone.items() if 'rel_pos' not in key}
    assert_same(converted.backbone, expected)


def test_vitae_is_no_plain_vit():
    """Its blocks have all that PlainViT's have, and more."""
    with torch.device('meta'):
        weights = MODELS.build(dict(type='ViTAE', arch='base', img_size=224)).state_dict()
    with pytest.raises(CheckpointError, match=r'the keys fit no plainvit/\* layout, but vitae/mmvitzoo'):
        convert(weights, family='plainvit')


@pytest.mark.parametrize('dim, heads', [(48, 3), (224, 7)])
def test_unusual_width_loads_its_own_weights(tmp_path, dim, heads):
    cfg = dict(type='PlainViT', arch=dict(ARCH, embed_dims=dim, num_heads=heads), img_size=64)
    model = MODELS.build(cfg)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    load_pretrained(MODELS.build(cfg), str(tmp_path / 'a.pth'))
    bare = dict(cfg, with_cls_token=False, residual_block_indexes=(0,))
    torch.save(MODELS.build(bare).state_dict(), tmp_path / 'b.pth')
    load_pretrained(MODELS.build(bare), str(tmp_path / 'b.pth'))


def test_cascade_of_lvis_can_be_saved(load_golden, tmp_path):
    weights = detectron2_detector(load_golden, stages=('.0', '.1', '.2'))
    weights['roi_heads.box_predictor.1.fed_loss_cls_weights'] = torch.ones(80)
    converted = convert(weights)
    assert 'annotations' in converted.dropped['roi_heads.box_predictor.1.fed_loss_cls_weights']
    save(converted.state_dict, tmp_path / 'a.safetensors')


def test_folded_scale_is_exact_for_heads_of_64():
    model = vitdet(arch=dict(ARCH, embed_dims=192), final_norm=True, pretrain_img_size=None)
    theirs = {key.replace('stem.projection', 'patch_embed.proj'): v for key, v in model.state_dict().items()}
    theirs = {key.replace('stem.', ''): value for key, value in theirs.items()}
    theirs['fpn1.0.weight'] = torch.zeros(192, 192, 2, 2)
    converted = convert(theirs)
    tables = {key: value for key, value in converted.backbone.items() if 'rel_pos' in key}
    assert len(tables) == 8 and all(torch.equal(8 * value, theirs[key]) for key, value in tables.items())


def test_hugging_face():
    """Names of transformers' VitDetModel."""
    model = vitdet(residual_block_indexes=(1,))
    theirs = {key.replace('stem.projection', 'embeddings.projection'): v for key, v in model.state_dict().items()}
    theirs = {key.replace('blocks.', 'encoder.layer.').replace('.attn.', '.attention.'): v for key, v in theirs.items()}
    for i, name in enumerate(('conv1', 'norm1', None, 'conv2', 'norm2', None, 'conv3', 'norm3')):
        theirs = {key.replace(f'.residual.{i}.', f'.residual.{name}.'): value for key, value in theirs.items()}
    positions = theirs.pop('stem.pos_embed')
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
    ],
)
def test_ours_tells_how_it_was_built(kwargs):
    model = vitdet(**kwargs)
    converted = convert(model.state_dict())
    assert converted.source == 'mmvitzoo'
    again = MODELS.build(converted.backbone_cfg).eval()
    again.load_state_dict(converted.backbone, strict=True)
    x = torch.randn(1, 3, 80, 112)
    with torch.no_grad():
        torch.testing.assert_close(again(x)[0], model.eval()(x)[0], atol=1e-6, rtol=1e-5)


def test_classifier_into_a_detector(tmp_path):
    """What it lacks is new; its class token goes; positions and tables are resized."""
    timm, weights = timm_weights()
    save(timm, tmp_path / 'vit.safetensors')
    arch = dict(type='PlainViT', arch='tiny', with_cls_token=False, window_size=14, global_attn_indexes=(2, 5, 8, 11))
    model = MODELS.build(dict(arch, img_size=320, use_rel_pos=True, residual_block_indexes=(11,)))
    load_pretrained(model, str(tmp_path / 'vit.safetensors'))
    assert torch.equal(model.blocks[3].mlp.fc1.weight, weights['backbone.blocks.3.mlp.fc1.weight'])
    assert model.stem.pos_embed.shape == (1, 400, 192) and not model.blocks[2].attn.rel_pos_h.any()
    # A part of the new weights is a broken file, not a classifier.
    state = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    del state['backbone.blocks.11.residual.4.bias']
    torch.save(state, tmp_path / 'broken.pth')
    with pytest.raises(CheckpointError, match='lacks 1 weights of PlainViT: blocks.11.residual.4.bias'):
        load_pretrained(model, str(tmp_path / 'broken.pth'))


def test_tables_of_the_other_convention_are_refused(tmp_path, load_golden):
    reference = load_golden('vitdet_d2_small')
    torch.save(reference.state_dict, tmp_path / 'a.pth')
    cfg = convert(reference.state_dict).backbone_cfg
    load_pretrained(MODELS.build(cfg), str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match='a.pth: relative positions .* converted for rel_pos_scaled=False'):
        load_pretrained(MODELS.build(dict(cfg, rel_pos_scaled=True)), str(tmp_path / 'a.pth'))
