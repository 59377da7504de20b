"""Layouts of MViTv2, in both directions."""

import pickle
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from forms import MVITV2
from mmengine.registry import MODELS

from mmvitzoo.checkpoints import CheckpointError, convert, export, load, load_pretrained, save
from mmvitzoo.models import MViTv2

ROOT = Path(__file__).resolve().parents[3]
mvitv2 = partial(MViTv2, MVITV2)


def whole(model, **more):
    return {**{f'backbone.{key}': value for key, value in model.state_dict().items()}, **more}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_detectron2_pickle(tmp_path):
    model = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    prefix = 'backbone.bottom_up.'
    names = {'.shortcut_proj.': '.proj.', **{f'norm{i}.': f'scale{i + 2}_norm.' for i in range(4)}}
    theirs = {}
    for key, value in model.state_dict().items():
        for ours, name in names.items():
            if not (key.startswith('blocks') and ours.startswith('norm')):
                key = key.replace(ours, name)
        theirs[prefix + key] = value.numpy()
    (tmp_path / 'model.pkl').write_bytes(pickle.dumps(dict(model=theirs, __author__='x')))
    again = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    load_pretrained(again, str(tmp_path / 'model.pkl'))
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize('in_attention', [True, False])
@pytest.mark.parametrize('source', ['timm', 'mmpretrain', 'official'])
def test_export_and_convert_are_inverse(source, in_attention):
    model = mvitv2(dim_mul_in_attention=in_attention)
    weights = whole(model, **{'head.fc.weight': torch.randn(7, 128), 'head.fc.bias': torch.randn(7)})
    theirs = export(weights, 'mvitv2', source)
    if source == 'timm':
        part, stage = ('attn', 'stages.2.blocks.0') if in_attention else ('mlp', 'stages.1.blocks.1')
        assert f'{stage}.shortcut_proj_{part}.weight' in theirs and 'stages.3.blocks.0.mlp.fc1.weight' in theirs
    converted = convert(theirs)
    assert converted.source == source
    assert_same(converted.state_dict, weights)
    again = MODELS.build(converted.backbone_cfg).eval()
    again.load_state_dict(converted.backbone, strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x)[0], model.eval()(x)[0])


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(img_size=(96, 320)),
        dict(dim_mul_in_attention=False),
        dict(window_attention=True, out_indices=(0, 1, 2, 3)),
        dict(window_attention=True, out_indices=(1, 2, 3), img_size=448),
    ],
)
def test_arguments_are_inferred(kwargs):
    model = mvitv2(**kwargs)
    model.init_weights()
    converted = convert(model.state_dict())
    assert converted.source == 'mmvitzoo'
    assert converted.backbone_cfg.get('img_size', 224) == kwargs.get('img_size', 224)
    again = MODELS.build(converted.backbone_cfg).eval()
    again.load_state_dict(converted.backbone, strict=True)
    x = torch.randn(1, 3, 80, 112)
    with torch.no_grad():
        for a, b in zip(again(x), model.eval()(x)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('in_attention', [True, False])
@pytest.mark.parametrize('out_indices', [(0, 1), (0,)])
def test_early_stages_of_a_published_variant(out_indices, in_attention):
    kwargs = dict(window_attention=True, out_indices=out_indices, dim_mul_in_attention=in_attention)
    with torch.device('meta'):
        weights = MViTv2('tiny', **kwargs).state_dict()
        converted = convert(weights)
        MODELS.build(converted.backbone_cfg).load_state_dict(weights, strict=True)
    assert converted.arch == 'tiny' and converted.backbone_cfg['out_indices'] == out_indices
    if out_indices == (0, 1):  # a single stage has only tables of its windows
        assert 'img_size' not in converted.backbone_cfg


def test_early_stages_of_an_unpublished_variant_are_refused():
    with pytest.raises(CheckpointError, match=r'mvitv2/mmvitzoo: no config .*: blocks.3 is missing'):
        convert(mvitv2(out_indices=(0, 1)).state_dict())


def test_classifier_initializes_a_detector(tmp_path):
    """Its last norm is kept; the norms of earlier maps are new."""
    classifier = mvitv2()
    torch.nn.init.normal_(classifier.norm3.weight)
    weights = export(whole(classifier, **{'head.fc.weight': torch.randn(7, 128)}), 'mvitv2', 'official')
    torch.save(dict(model_state=weights, epoch=300), tmp_path / 'MViTv2.pyth')
    detector = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    load_pretrained(detector, str(tmp_path / 'MViTv2.pyth'))
    for key, value in classifier.state_dict().items():
        assert torch.equal(detector.state_dict()[key], value), key
    assert detector.norm0.weight.eq(1).all()


def test_detector_initializes_another_with_more_maps(tmp_path):
    """A RetinaNet's backbone has no norm for the first map."""
    torch.save(mvitv2(out_indices=(1, 2, 3), window_attention=True).state_dict(), tmp_path / 'retinanet.pth')
    detector = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    load_pretrained(detector, str(tmp_path / 'retinanet.pth'))
    broken = detector.state_dict()
    del broken['norm1.bias']
    torch.save(broken, tmp_path / 'broken.pth')
    with pytest.raises(CheckpointError, match='lacks 1 weights of MViTv2: norm1.bias'):
        load_pretrained(detector, str(tmp_path / 'broken.pth'))


def test_other_dim_mul_in_attention_is_refused(tmp_path):
    """MViTv2-L's classifier and its detector differ in it."""
    torch.save(mvitv2(dim_mul_in_attention=False).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='dim_mul_in_attention=False, the model has dim_mul_in_attention=True'):
        load_pretrained(mvitv2(), str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('source', ['timm', 'mmpretrain'])
def test_converter_writes_the_classifier_of_a_detector(source):
    """Heads and norms of earlier maps, which classifiers do not have, are dropped."""
    rename = runpy.run_path(str(ROOT / 'tools/model_converters/convert.py'))['rename']
    model = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    renamed, converted = rename(whole(model, **{'rpn_head.rpn_cls.bias': torch.zeros(3)}), source)
    assert set(converted.dropped) == {
        'rpn_head.rpn_cls.bias',
        *(f'backbone.norm{stage}.{leaf}' for stage in range(3) for leaf in ('weight', 'bias')),
    }
    assert convert(renamed).source == source


@pytest.mark.parametrize('key', ['blocks.0.attn.gamma', 'blocks.0.gamma_1'])
def test_unknown_keys_are_refused(key):
    with pytest.raises(CheckpointError, match=f'mvitv2/official has no rule for 1 keys: {key}'):
        convert({**export(whole(mvitv2()), 'mvitv2', 'official'), key: torch.zeros(1)})


def test_class_token_is_refused_unless_the_user_deletes_it(tmp_path):
    weights = export(whole(mvitv2()), 'mvitv2', 'official')
    torch.save(dict(model_state={**weights, 'cls_token': torch.zeros(1, 1, 16)}), tmp_path / 'in21k.pyth')
    with pytest.raises(CheckpointError, match='mvitv2/official: cls_token is a class token, which .* would change'):
        convert(load(tmp_path / 'in21k.pyth'))
    remaining = load(tmp_path / 'in21k.pyth')
    del remaining['cls_token']
    save(remaining, tmp_path / 'without-token.pth')
    load_pretrained(mvitv2(out_indices=(0, 1, 2, 3), window_attention=True), str(tmp_path / 'without-token.pth'))


def test_first_version_of_mvit_is_refused():
    weights = export(whole(mvitv2()), 'mvitv2', 'mmpretrain')
    with pytest.raises(CheckpointError, match='mmpretrain: backbone.pos_embed .* only the first version of MViT'):
        convert({**weights, 'backbone.pos_embed': torch.zeros(1, 3136, 16)})
