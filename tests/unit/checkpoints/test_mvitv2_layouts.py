"""Layouts of MViTv2, and the way back."""

import pickle
from functools import partial

import pytest
import torch
from forms import MVITV2
from mmengine.registry import MODELS

from mmvitzoo.checkpoints import CheckpointError, convert, export, load, load_pretrained, save
from mmvitzoo.checkpoints.command import rename_to
from mmvitzoo.models import MViTv2

mvitv2 = partial(MViTv2, MVITV2)


def whole(model, **more):
    return {**{f'backbone.{key}': value for key, value in model.state_dict().items()}, **more}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_pickle_of_detectron2(tmp_path):
    model = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    prefix = 'backbone.bottom_up.'
    names = {'stem.': 'patch_embed.proj.', '.skip.': '.proj.', **{f'norm{i}.': f'scale{i + 2}_norm.' for i in range(4)}}
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
def test_there_and_back_is_the_identity(source, in_attention):
    model = mvitv2(dim_mul_in_attention=in_attention)
    weights = whole(model, **{'head.fc.weight': torch.randn(7, 128), 'head.fc.bias': torch.randn(7)})
    theirs = export(weights, 'mvitv2', source)
    if source == 'timm':
        kind, stage = ('attn', 'stages.2.blocks.0') if in_attention else ('mlp', 'stages.1.blocks.1')
        assert f'{stage}.shortcut_proj_{kind}.weight' in theirs and 'stages.3.blocks.0.mlp.fc1.weight' in theirs
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
def test_ours_tells_how_it_was_built(kwargs):
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


@pytest.mark.parametrize('out_indices', [(0, 1), (0,)])
def test_early_stages_of_a_published_variant(out_indices):
    with torch.device('meta'):
        weights = MViTv2('tiny', window_attention=True, out_indices=out_indices).state_dict()
        converted = convert(weights)
        MODELS.build(converted.backbone_cfg).load_state_dict(weights, strict=True)
    assert converted.arch == 'tiny' and converted.backbone_cfg['out_indices'] == out_indices
    if out_indices == (0, 1):  # one stage has the tables of its windows alone
        assert 'img_size' not in converted.backbone_cfg


def test_part_of_an_unknown_variant():
    with pytest.raises(CheckpointError, match=r'mvitv2/mmvitzoo .* \(in our names\): blocks.3'):
        convert(mvitv2(out_indices=(0, 1)).state_dict())


def test_classifier_into_a_detector(tmp_path):
    """The norms that it lacks are new, its own last one stays."""
    classifier = mvitv2()
    torch.nn.init.normal_(classifier.norm3.weight)
    weights = export(whole(classifier, **{'head.fc.weight': torch.randn(7, 128)}), 'mvitv2', 'official')
    torch.save(dict(model_state=weights, epoch=300), tmp_path / 'MViTv2.pyth')
    detector = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    load_pretrained(detector, str(tmp_path / 'MViTv2.pyth'))
    for key, value in classifier.state_dict().items():
        assert torch.equal(detector.state_dict()[key], value), key
    assert detector.norm0.weight.eq(1).all()


def test_detector_starts_from_a_detector_with_fewer_maps(tmp_path):
    """A RetinaNet's backbone has no norm for the first map."""
    torch.save(mvitv2(out_indices=(1, 2, 3), window_attention=True).state_dict(), tmp_path / 'retinanet.pth')
    detector = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    load_pretrained(detector, str(tmp_path / 'retinanet.pth'))
    broken = detector.state_dict()
    del broken['norm1.bias']
    torch.save(broken, tmp_path / 'broken.pth')
    with pytest.raises(CheckpointError, match='lacks 1 weights of MViTv2: norm1.bias'):
        load_pretrained(detector, str(tmp_path / 'broken.pth'))


def test_the_other_place_of_doubling_is_named(tmp_path):
    """Large's classifier and its detector."""
    torch.save(mvitv2(dim_mul_in_attention=False).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='dim_mul_in_attention=False, the model has dim_mul_in_attention=True'):
        load_pretrained(mvitv2(), str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('source', ['timm', 'mmpretrain'])
def test_detector_to_a_classifier(source):
    """Norms of maps that a classifier does not have stay behind, with the heads."""
    model = mvitv2(out_indices=(0, 1, 2, 3), window_attention=True)
    renamed, converted = rename_to(source)(whole(model, **{'rpn_head.rpn_cls.bias': torch.zeros(3)}))
    assert set(converted.dropped) == {
        'rpn_head.rpn_cls.bias',
        *(f'backbone.norm{stage}.{leaf}' for stage in range(3) for leaf in ('weight', 'bias')),
    }
    assert convert(renamed).source == source


@pytest.mark.parametrize('key', ['blocks.0.attn.gamma', 'blocks.0.gamma_1'])
def test_weights_that_no_rule_covers(key):
    with pytest.raises(CheckpointError, match=f'mvitv2/official has no rule for 1 keys: {key}'):
        convert({**export(whole(mvitv2()), 'mvitv2', 'official'), key: torch.zeros(1)})


def test_class_token_is_refused_and_can_be_left_out_knowingly(tmp_path):
    weights = export(whole(mvitv2()), 'mvitv2', 'official')
    torch.save(dict(model_state={**weights, 'cls_token': torch.zeros(1, 1, 16)}), tmp_path / 'in21k.pyth')
    with pytest.raises(CheckpointError, match='mvitv2/official: cls_token is a class token, which .* another one'):
        convert(load(tmp_path / 'in21k.pyth'))
    left = load(tmp_path / 'in21k.pyth')
    del left['cls_token']
    save(left, tmp_path / 'without-token.pth')
    load_pretrained(mvitv2(out_indices=(0, 1, 2, 3), window_attention=True), str(tmp_path / 'without-token.pth'))


def test_first_version_of_mmpretrain_is_refused():
    weights = export(whole(mvitv2()), 'mvitv2', 'mmpretrain')
    with pytest.raises(CheckpointError, match='mmpretrain: backbone.pos_embed .* only the first version of MViT'):
        convert({**weights, 'backbone.pos_embed': torch.zeros(1, 3136, 16)})
