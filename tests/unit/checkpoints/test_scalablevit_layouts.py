"""Layout of ScalableViT with both kinds of classifier head, in both directions."""

import pytest
import torch
from forms import SCALABLE
from mmengine.registry import MODELS

from mmvitzoo.checkpoints import CheckpointError, convert, export, load_pretrained
from mmvitzoo.models import ScalableViT

STACKED = ('head.layers.0.fc', 'head.layers.0.norm', 'head.layers.1.fc')


def weights(model, heads):
    names = {f'{head}.{leaf}': torch.randn(3) for head in heads for leaf in ('weight', 'bias')}
    return {**{f'backbone.{key}': value for key, value in model.state_dict().items()}, **names}


@pytest.mark.parametrize('heads', [STACKED, ('head.fc',), ()])
def test_export_and_convert_are_inverse(heads):
    ours = weights(ScalableViT(SCALABLE, out_indices=(3,)), heads)
    theirs = export(ours, 'scalablevit', 'official')
    if heads == STACKED:
        assert {'head.0.weight', 'head.1.bias', 'head.3.weight'} <= theirs.keys()
    elif heads:
        assert {'head.weight', 'head.bias'} <= theirs.keys()
    assert {'pos_block.2.proj.0.bias', 'stages.1.1.attn.norm_act.0.weight', 'norm.bias'} <= theirs.keys()
    converted = convert(theirs)
    assert converted.source == 'official' and not converted.dropped
    assert converted.state_dict.keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in converted.state_dict.items())
    MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)


def test_out_indices_are_inferred():
    with torch.device('meta'):
        weights = ScalableViT('small', out_indices=(0, 2)).state_dict()
        converted = convert(weights)
        again = MODELS.build(converted.backbone_cfg)
        again.load_state_dict(weights, strict=True)
    assert (converted.source, converted.arch, again.out_indices) == ('mmvitzoo', 'small', (0, 2))


def test_classifier_initializes_a_detector(tmp_path):
    """Its norm is that of the last map; the other norms are new."""
    classifier = ScalableViT(SCALABLE, out_indices=(3,))
    torch.nn.init.normal_(classifier.norm3.weight)
    torch.save({'state_dict': export(weights(classifier, STACKED), 'scalablevit', 'official')}, tmp_path / 'a.pth')
    detector = ScalableViT(SCALABLE)
    load_pretrained(detector, str(tmp_path / 'a.pth'))
    assert torch.equal(detector.norm3.weight, classifier.norm3.weight) and detector.norm0.weight.eq(1).all()
    with pytest.raises(CheckpointError, match='scalablevit/official has no rule for 1 keys: head.2.weight'):
        convert({**export(weights(classifier, ()), 'scalablevit', 'official'), 'head.2.weight': torch.zeros(1)})
