"""BNHead: its definition, the authors' published files, and wrong channels."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope

import mmvitzoo.models.decode_heads  # noqa: F401  registers the head

pytestmark = pytest.mark.stack


@pytest.fixture(autouse=True)
def mmseg_scope():
    """Resets the default scope, which other tests change."""
    init_default_scope('mmseg')


def build(in_channels=(8, 8), **kwargs):
    channels = dict(in_channels=list(in_channels), in_index=list(range(len(in_channels))), channels=sum(in_channels))
    cfg = dict(type='BNHead', input_transform='resize_concat', num_classes=5, norm_cfg=dict(type='BN'))
    return MODELS.build({**cfg, **channels, **kwargs})


def published_file(path, channels):
    """Writes a file with the keys and the metadata of the authors' heads; returns its weights."""
    torch.manual_seed(0)
    weights = {f'decode_head.bn.{x}': torch.rand(channels) for x in ('weight', 'bias', 'running_mean', 'running_var')}
    weights['decode_head.conv_seg.weight'] = torch.rand(5, channels, 1, 1)
    weights['decode_head.conv_seg.bias'] = torch.rand(5)
    weights['decode_head.bn.num_batches_tracked'] = torch.tensor(7)
    torch.save(dict(meta=dict(CLASSES=('wall',), PALETTE=[[1, 2, 3]]), state_dict=weights), path)
    return weights


def test_published_head_loads_whole(tmp_path):
    """All tensors of the authors' file are in the head, and it computes what the definition says."""
    path = tmp_path / 'dinov2_vits14_ade20k_ms_head.pth'
    weights = published_file(path, 16)
    head = build(init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='decode_head.')).eval()
    head.init_weights()
    assert {f'decode_head.{key}' for key in head.state_dict()} == set(weights)
    for key, value in head.state_dict().items():
        assert torch.equal(value, weights[f'decode_head.{key}']), key
    first, second = torch.rand(1, 8, 6, 7), torch.rand(1, 8, 3, 4)
    x = torch.cat([first, F.interpolate(second, (6, 7), mode='bilinear')], 1)
    bn = {key.rpartition('.')[2]: value for key, value in weights.items() if '.bn.' in key}
    x = F.batch_norm(x, bn['running_mean'], bn['running_var'], bn['weight'], bn['bias'])
    expected = F.conv2d(x, weights['decode_head.conv_seg.weight'], weights['decode_head.conv_seg.bias'])
    torch.testing.assert_close(head((first, second)), expected)


@pytest.mark.parametrize('change', [dict(channels=8), dict(input_transform='multiple_select')])
def test_other_channels_are_refused(change):
    with pytest.raises(ValueError, match='channels is the sum of in_channels'):
        build(**change)
