"""``init_cfg=dict(type='Pretrained')`` on a backbone."""

import re

import pytest
import torch
from forms import MPVIT, slim
from mmengine.registry import MODELS
from torch import nn

from mmvitzoo.checkpoints import CheckpointError, convert, load_pretrained, pretrained, reading, save
from mmvitzoo.models import MPViT, PlainViT


@pytest.fixture(scope='module')
def official(load_golden):
    return load_golden('mpvit_tiny_official').state_dict


def build(checkpoint, **kwargs):
    config = dict(type='MPViT', arch='tiny', init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)))
    config['init_cfg'].update(kwargs.pop('init_cfg', {}))
    model = MODELS.build({**config, **kwargs})
    model.init_weights()
    return model


def test_original_file_loads_with_a_log(tmp_path, official, monkeypatch):
    lines = []
    monkeypatch.setattr(pretrained, 'print_log', lambda line, logger: lines.append(line))
    torch.save({'model': official}, tmp_path / 'mpvit_tiny.pth')
    model = build(tmp_path / 'mpvit_tiny.pth')
    expected = convert(official).backbone
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    log = '\n'.join(lines)
    assert 'loaded 549 tensors of arch tiny' in log and '(official layout)' in log
    assert re.search('left out 322 tensors of .*: equal copy of a shared tensor', log)
    assert re.search('left out 2 tensors of .*: not in this backbone', log)  # the classifier


def test_backbone_of_a_detector_keeps_its_weights(tmp_path, official):
    """MMEngine initializes all modules of a model; loaded weights may not be overwritten."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    torch.save({'model': official}, tmp_path / 'mpvit_tiny.pth')
    config = Config.fromfile('configs/mpvit/retinanet_mpvit-tiny_fpn_1x_coco.py')
    config.model.backbone.init_cfg.checkpoint = str(tmp_path / 'mpvit_tiny.pth')
    init_default_scope('mmdet')
    model = MODELS.build(config.model)
    model.init_weights()
    expected = convert(official).backbone
    assert all(torch.equal(value, expected[key]) for key, value in model.backbone.state_dict().items())


def test_converted_file_with_and_without_prefix(tmp_path, official):
    converted = convert(official)
    save(converted.state_dict, tmp_path / 'a.safetensors')
    for init_cfg in ({}, dict(prefix='backbone.'), dict(prefix='backbone')):
        model = build(tmp_path / 'a.safetensors', init_cfg=init_cfg, out_indices=(1,))
        assert torch.equal(model.stem[0].conv.weight, official['stem.0.conv.weight'])
    with pytest.raises(CheckpointError, match=r"no key starts with 'neck\.'"):
        build(tmp_path / 'a.safetensors', init_cfg=dict(prefix='neck.'))


def test_prefix_keeps_the_metadata(tmp_path):
    """Without them, 3 heads would be assumed, and the positions would be taken as 12 x 12."""
    arch = dict(embed_dims=192, num_layers=1, num_heads=6, mlp_ratio=1)
    detector = nn.ModuleDict(dict(backbone=PlainViT(arch, img_size=(256, 144))))
    torch.save(detector.state_dict(), tmp_path / 'a.pth')
    path = str(tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='num_heads=6, the model has'):
        load_pretrained(PlainViT(dict(arch, num_heads=3)), path, 'backbone.')
    model = PlainViT(arch, img_size=(128, 72))
    load_pretrained(model, path, 'backbone.')
    expected = PlainViT(arch, img_size=(128, 72))
    expected.load_state_dict(detector.backbone.state_dict())
    assert torch.equal(model.pos_embed, expected.pos_embed)


def test_key_of_the_weights(tmp_path, official):
    average = {key: value + 1 if key == 'stem.0.conv.weight' else value for key, value in official.items()}
    torch.save(dict(model=official, model_ema=average), tmp_path / 'a.pth')
    for init_cfg, weights in (({}, official), (dict(key='model_ema'), average)):
        model = build(tmp_path / 'a.pth', init_cfg=init_cfg, out_indices=(0,))
        assert torch.equal(model.stem[0].conv.weight, weights['stem.0.conv.weight'])


def test_other_variant_is_refused(tmp_path, official):
    torch.save(official, tmp_path / 'a.pth')
    with pytest.raises(
        CheckpointError, match=r'holds MPViT of arch tiny, which the model is not: size.*\. \(\d+ more differ\)$'
    ):
        build(tmp_path / 'a.pth', arch='xsmall')


def test_other_model_is_refused(tmp_path):
    torch.save({'conv1.weight': torch.zeros(1)}, tmp_path / 'resnet.pth')
    with pytest.raises(CheckpointError, match='resnet.pth: the keys fit no mpvit/. layout.*conv1.weight'):
        build(tmp_path / 'resnet.pth')


def test_missing_weights_are_refused(tmp_path, official):
    incomplete = {key: value for key, value in official.items() if not key.endswith('InvRes.norm.bias')}
    torch.save(incomplete, tmp_path / 'a.pth')
    with pytest.raises(
        CheckpointError, match='a.pth: lacks 4 weights of MPViT: stages.0.local.1.bn.bias.*; it holds arch tiny$'
    ):
        build(tmp_path / 'a.pth')


def test_subclass_of_a_backbone_loads_weights(tmp_path):
    class Changed(MPViT):
        pass

    torch.save(slim('mpvit').state_dict(), tmp_path / 'a.pth')
    model = Changed(MPVIT, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))
    model.init_weights()
    assert torch.equal(model.stem[0].conv.weight, slim('mpvit').stem[0].conv.weight)


def test_log_marks_assumed_arguments(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(pretrained, 'print_log', lambda line, logger: lines.append(line))
    model = PlainViT('tiny')
    torch.save(dict(model.state_dict()), tmp_path / 'a.pth')  # without metadata
    load_pretrained(model, str(tmp_path / 'a.pth'))
    assert 'loaded 150 tensors of arch tiny, num_heads=3 (assumed) from' in lines[0] and '(timm layout)' in lines[0]


def test_address_is_downloaded_once_per_node(tmp_path, monkeypatch):
    """The other tests of downloads are in test_reading.py."""
    torch.save(slim('mpvit').state_dict(), tmp_path / 'a.pth')
    waited = []
    monkeypatch.setattr(reading, '_cache_path', lambda url: str(tmp_path / 'a.pth'))
    monkeypatch.setattr(pretrained, 'download_once_per_node', waited.append)
    load_pretrained(slim('mpvit'), 'https://example.org/a.pth')
    assert waited == ['https://example.org/a.pth']
