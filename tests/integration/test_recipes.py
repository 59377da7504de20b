"""Data pipelines of the recipes on real images, and their learning rates over a whole training."""

import json
import math
import re
from functools import lru_cache

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from zoo_configs import FOLDERS, RECIPES, group_by, read_config

# Training images of ImageNet-1k, COCO (without those that have no boxes) and ADE20K.
IMAGES = dict(mmpretrain=1281167, mmdet=117266, mmseg=20210)


def iterations_per_epoch(config):
    """Counts the iterations of an epoch on the GPUs of the recipe: those in the file name, or 8."""
    gpus = re.search(r'_(\d+)xb', config.filename)
    images = IMAGES[config.default_scope] * config.train_dataloader.dataset.get('times', 1)
    return math.ceil(images / (int(gpus[1]) if gpus else 8) / config.train_dataloader.batch_size)


def data_key(split):
    """Returns a function that is equal for configs with the same dataloader and preprocessor."""

    def key(config):
        model = config.model
        augments = split == 'train' and config.default_scope == 'mmpretrain' and model.get('train_cfg')
        masks = 'mask_head' in model.get('roi_head', {})
        preprocessors = config.get('data_preprocessor'), model.get('data_preprocessor')
        return [config[f'{split}_dataloader'], *preprocessors, augments, masks]

    return key


def groups_of(folder, split):
    """Lists the groups of recipes with the same data whose first config is in a folder."""
    return [members for members in group_by(data_key(split), RECIPES) if members[0].startswith(f'{folder}/')]


def next_batch(config, split):
    """Returns the first batch after the data preprocessor: at most 8 images of a classifier, 2 large ones of others."""
    init_default_scope(config.default_scope)
    loader = config[f'{split}_dataloader']
    most = 8 if config.default_scope == 'mmpretrain' else 2
    loader.update(num_workers=0, persistent_workers=False, batch_size=min(loader.batch_size, most))
    loader.pop('prefetch_factor', None)
    if 'lvis' in config.filename:  # reading its annotations would need the package lvis
        dataset = loader.dataset.get('dataset', loader.dataset)
        dataset.update(type='CocoDataset', data_root='data/coco/', ann_file=f'annotations/instances_{split}2017.json')
        dataset.data_prefix = dict(img=f'{split}2017/')
    if config.default_scope == 'mmpretrain':  # its classifier merges these
        augments = config.model.get('train_cfg')
        preprocessor = dict(config.data_preprocessor, type='ClsDataPreprocessor', batch_augments=augments)
    else:
        preprocessor = config.model.data_preprocessor
    data = next(iter(Runner.build_dataloader(loader, seed=0)))
    data = MODELS.build(preprocessor)(data, training=split == 'train')
    inputs, samples = data['inputs'], data['data_samples']
    assert len(inputs) == len(samples) == loader.batch_size and inputs.isfinite().all()
    return inputs, samples


@pytest.mark.stack
@pytest.mark.parametrize('folder', FOLDERS)
def test_training_pipeline(folder, mock_datasets, monkeypatch, subtests):
    """Training batches have the size of the recipe's crops and valid annotations."""
    monkeypatch.chdir(mock_datasets)
    for members in groups_of(folder, 'train'):
        with subtests.test(', '.join(members)):
            config = read_config(members[0])
            inputs, samples = next_batch(config, 'train')
            if config.default_scope == 'mmpretrain':
                assert inputs.shape[1:] == (3, 224, 224)
                if 'train_cfg' in config.model:  # labels of mixed images
                    assert all(sample.gt_score.sum() == pytest.approx(1) for sample in samples)
                else:
                    assert all(0 <= sample.gt_label < 1000 for sample in samples)
            elif config.default_scope == 'mmseg':
                side = crop_size(config)
                assert inputs.shape[1:] == (3, side, side)
                assert all(sample.gt_sem_seg.shape == (side, side) for sample in samples)
            else:
                check_detection(config, inputs, samples)


def crop_size(config):
    return int(re.search(r'ade20k-(\d+)x', config.filename)[1])


def check_detection(config, inputs, samples):
    height, width = inputs.shape[2:]
    if 'lsj' in config.filename:
        assert (height, width) == (1024, 1024)
    elif config.model.data_preprocessor.get('pad_size_divisor', 1) > 1:
        assert height % 32 == width % 32 == 0
    assert sum(len(sample.gt_instances) for sample in samples)
    for sample in samples:
        instances = sample.gt_instances
        boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
        assert (boxes >= 0).all() and (boxes[:, 2::2] <= width).all() and (boxes[:, 3::2] <= height).all()
        assert ('masks' in instances) == ('mask_head' in config.model.get('roi_head', {}))
        if 'masks' in instances:
            assert instances.masks.masks.shape == (len(boxes), height, width)


@pytest.mark.stack
@pytest.mark.parametrize('folder', FOLDERS)
def test_validation_pipeline(folder, mock_datasets, monkeypatch, subtests):
    """Validation images have the size of the recipe, and samples keep annotations and the size before padding."""
    monkeypatch.chdir(mock_datasets)
    for members in groups_of(folder, 'val'):
        with subtests.test(', '.join(members)):
            config = read_config(members[0])
            inputs, samples = next_batch(config, 'val')
            if config.default_scope == 'mmpretrain':
                assert inputs.shape[1:] == (3, 224, 224) and 'gt_label' in samples[0]
                continue
            height, width = samples[0].img_shape
            assert min(samples[0].ori_shape) < min(height, width)
            if config.default_scope == 'mmseg':
                assert (height, width) == inputs.shape[2:] and min(height, width) == crop_size(config)
                assert 'gt_sem_seg' in samples[0]
            elif folder == 'vitdet':
                assert inputs.shape[2:] == (1024, 1024) and max(height, width) == 1024
            else:
                assert (
                    min(height, width) == 800 and not inputs[0, :, height:].any() and not inputs[0, :, :, width:].any()
                )


@lru_cache(maxsize=None)
def learning_rates(schedulers, rate, epoch, total):
    """Returns the learning rate at each iteration; ``schedulers`` is JSON, so that recipes share results."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.SGD([parameter], lr=rate))
    schedulers = [
        PARAM_SCHEDULERS.build(cfg, default_args=dict(optimizer=wrapper, epoch_length=epoch))
        for cfg in json.loads(schedulers)
    ]
    wrapper.optimizer.step()  # PyTorch wants it before the first step of a scheduler
    group, rates = wrapper.param_groups[0], []
    for step in range(total):
        rates.append(group['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or (step + 1) % epoch == 0:
                scheduler.step()
    return rates


def step_decays(name):
    """Returns the fractions of the training at which the published recipe divides the learning rate by 10."""
    if 'deformable' in name:
        return (40 / 50,)
    if 'vitae' in name:
        return 22 / 25, 24 / 25
    if 'scalablevit' in name or 'dino' in name or name.startswith('timm/'):  # MMDetection's
        return (27 / 36, 33 / 36) if '3x' in name else (8 / 12, 11 / 12)
    if '3x' in name:  # Detectron2's
        return 7 / 9, 25 / 27
    return (2 / 3, 8 / 9) if '1x' in name else (8 / 9, 26 / 27)


def expected(name, config, epoch, total, start):
    """Returns (iteration, factor of the recipe's learning rate) after a warm-up that ends at iteration ``start``."""
    if config.default_scope == 'mmpretrain':  # cosine to 1e-5, in steps of an epoch
        warm_up, epochs = round(start / epoch), config.train_cfg.max_epochs
        last = 1e-5 / config.optim_wrapper.optimizer.lr
        cosines = {at: (1 + math.cos(math.pi * (at - warm_up) / (epochs - warm_up))) / 2 for at in (100, 200, 299)}
        return [(at * epoch, last + (1 - last) * cosine) for at, cosine in cosines.items()]
    if config.default_scope == 'mmseg':  # polynomial to 0
        power = config.param_scheduler[-1].power
        return [(start + int(at * (total - start)), (1 - at) ** power) for at in (0.5, 0.75)]
    points = []
    for i, at in enumerate(step_decays(name)):
        points += [(round(at * total) - 2, 0.1**i), (round(at * total) + 1, 0.1 ** (i + 1))]
    return points


def test_learning_rates(subtests):
    """The learning rate rises to the recipe's value and then falls as published, over the whole training."""
    for name in RECIPES:
        config = read_config(name)
        epoch = iterations_per_epoch(config)
        loop = config.train_cfg
        total = loop.max_iters if 'max_iters' in loop else loop.max_epochs * epoch
        schedulers = config.param_scheduler
        for cfg in schedulers if isinstance(schedulers, list) else [schedulers]:
            cfg.setdefault('end', loop.max_epochs if cfg.get('by_epoch', True) else total)
        rate = config.optim_wrapper.optimizer.lr
        text = json.dumps(config._cfg_dict.to_dict()['param_scheduler'])
        with subtests.test(name):
            rates = learning_rates(text, rate, epoch, total)
            start = rates.index(max(rates))
            assert rates[start] == pytest.approx(rate) and rates[-1] >= 0
            assert rates[:start] == sorted(rates[:start]) and rates[start:] == sorted(rates[start:], reverse=True)
            for step, factor in expected(name, config, epoch, total, start):
                assert rates[step] == pytest.approx(factor * rate, rel=1e-3), (step, rates[step] / rate)
