"""MultiChannelDetDataPreprocessor against its definition and DetDataPreprocessor."""

import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.structures import DetDataSample

from mmvitzoo.models.data_preprocessors import MultiChannelDetDataPreprocessor

pytestmark = pytest.mark.stack

MEAN, STD = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 10.0]


def batch(*shapes, dtype=torch.float):
    samples = [DetDataSample(metainfo=dict(img_shape=shape[1:])) for shape in shapes]
    return dict(inputs=[torch.randint(0, 256, shape).to(dtype) for shape in shapes], data_samples=samples)


def test_normalizes_each_channel_and_pads():
    data = batch((5, 30, 40), (5, 32, 20))
    found = MultiChannelDetDataPreprocessor(MEAN, STD, pad_size_divisor=32)(data)['inputs']
    assert found.shape == (2, 5, 32, 64)
    for channel in range(5):
        expected = (data['inputs'][0][channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(found[0, channel, :30, :40], expected)
    assert (found[0, :, 30:] == 0).all() and (found[1, :, :, 20:] == 0).all()


@pytest.mark.parametrize('channels', [1, 3])
def test_equals_the_stock_preprocessor(channels):
    kwargs = dict(mean=MEAN[:channels], std=STD[:channels], pad_size_divisor=16, pad_value=7)
    data = batch((channels, 30, 40), dtype=torch.uint8)
    ours, theirs = (x(**kwargs)(data)['inputs'] for x in (MultiChannelDetDataPreprocessor, DetDataPreprocessor))
    assert torch.equal(ours, theirs)


def test_wrong_lengths_are_one_line():
    with pytest.raises(ValueError, match='mean and std have a value for each channel, got 4 and 5 values'):
        MultiChannelDetDataPreprocessor(MEAN[:4], STD)
    for channels in (1, 4):  # one channel would be broadcast
        with pytest.raises(ValueError, match=f'mean and std have 5 values, got an image of {channels} channels'):
            MultiChannelDetDataPreprocessor(MEAN, STD)(batch((channels, 32, 32)))


def test_channels_are_not_swapped():
    with pytest.raises(ValueError, match='channels have the order of the loader'):
        MultiChannelDetDataPreprocessor(MEAN, STD, bgr_to_rgb=True)
