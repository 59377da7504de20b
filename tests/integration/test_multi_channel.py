"""Configs for four bands and for gray; a training on four bands from weights for three channels."""

import make_mini_coco
import numpy as np
import pytest
import tifffile
import torch
from mmcv import imread
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner

from mmvitzoo import get_config

RGB, FOUR_BANDS, GRAY = (f'mask-rcnn_mpvit-tiny{x}_fpn_mini-coco' for x in ('', '-4ch', '-gray'))
pytestmark = pytest.mark.stack


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A few images of the demonstration data, with three and with four bands."""
    folder = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_mini_coco, 'NUM_IMAGES', dict(train=2, val=1))
        make_mini_coco.build_mini_coco(folder / 'rgb')
        make_mini_coco.build_mini_coco(folder / 'rgbn', near_infrared=True)
    return folder


def test_bands_of_the_demonstration_data(data):
    bands = tifffile.imread(data / 'rgbn/train/000001.tif')
    jpeg = imread(str(data / 'rgb/train/000001.jpg'), channel_order='rgb')
    semantic = imread(str(data / 'rgbn/semantic/train/000001.png'), 'unchanged')
    assert bands.dtype == np.uint16 and bands.shape == (*jpeg.shape[:2], 4)
    assert abs(bands[..., :3] / 257 - jpeg).mean() < 5  # compressed
    near_infrared = bands[..., 3] / 257
    assert near_infrared[semantic > 0].mean() > near_infrared[semantic == 0].mean() + 50


def test_gray_images_through_the_stock_pipeline(data):
    config = get_config(GRAY)
    init_default_scope('mmdet')
    config.train_dataloader.dataset.update(data_root=f'{data}/rgb/')
    batch = pseudo_collate([DATASETS.build(config.train_dataloader.dataset)[0]])
    image = MODELS.build(config.model.data_preprocessor)(batch)['inputs']
    ((height, width),) = {x.img_shape for x in batch['data_samples']}
    gray = imread(str(data / 'rgb/train/000001.jpg'), 'grayscale')
    expected = (torch.from_numpy(gray).float() - 116) / 57
    torch.testing.assert_close(image[0, :, :height, :width], expected[None])


def test_four_bands_train_from_three_channels(data, tmp_path, capfd):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    rgb = MODELS.build(get_config(RGB).model)
    rgb.init_weights()
    torch.save(dict(state_dict=rgb.state_dict()), tmp_path / 'rgb.pth')
    config = get_config(FOUR_BANDS)
    config.merge_from_dict(
        {
            'load_from': str(tmp_path / 'rgb.pth'),
            'work_dir': str(tmp_path),
            'train_cfg': dict(_delete_=True, type='IterBasedTrainLoop', max_iters=5),
            'train_dataloader': dict(
                batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=f'{data}/rgbn/')
            ),
            'optim_wrapper.optimizer.lr': 5e-4,
            'param_scheduler': [],
            'default_hooks': dict(logger=dict(interval=1), checkpoint=None),
            **{f'{mode}_{part}': None for mode in ('val', 'test') for part in ('dataloader', 'cfg', 'evaluator')},
        }
    )
    runner = Runner.from_cfg(config)
    runner.train()
    assert ''.join(capfd.readouterr()).count('MPViT: adapted the first convolution from 3 to 4 channels') == 1
    losses, _ = runner.message_hub.get_scalar('train/loss').data
    assert len(losses) == 5 and losses[-1] < 0.85 * losses[0]
