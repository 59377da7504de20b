"""Each distinct data pipeline of the recipes on real images; learning rates at the published milestones."""

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

IMAGES = dict(mmpretrain=1281167, mmdet=117266, mmseg=20210)  # of the training sets, as the toolboxes filter them


def steps_of_epoch(config):
    """With the GPUs that the recipe is for: those of the file's name, or 8."""
    gpus = re.search(r'_(\d+)xb', config.filename)
    images = IMAGES[config.default_scope] * config.train_dataloader.dataset.get('times', 1)
    return math.ceil(images / (int(gpus[1]) if gpus else 8) / config.train_dataloader.batch_size)


def data_of(split):
    """A key for configs with the same loader and preprocessor."""

    def key(config):
        model = config.model
        augments = split == 'train' and config.default_scope == 'mmpretrain' and model.get('train_cfg')
        masks = 'mask_head' in model.get('roi_head', {})
        preprocessors = config.get('data_preprocessor'), model.get('data_preprocessor')
        return [config[f'{split}_dataloader'], *preprocessors, augments, masks]

    return key


def groups_of(folder, split):
    """Recipes with the same data, in the folder of the first of them."""
    return [members for members in group_by(data_of(split), RECIPES) if members[0].startswith(f'{folder}/')]


def next_batch(config, split):
    """The first batch, as the model gets it."""
    init_default_scope(config.default_scope)
    loader = config[f'{split}_dataloader']
    loader.update(num_workers=0, persistent_workers=False, batch_size=min(loader.batch_size, 8))
    loader.pop('prefetch_factor', None)
    if 'lvis' in config.filename:  # its annotations need a package of their own
        dataset = loader.dataset.get('dataset', loader.dataset)
        dataset.update(type='CocoDataset', data_root='data/coco/', ann_file=f'annotations/instances_{split}2017.json')
        dataset.data_prefix = dict(img=f'{split}2017/')
    if config.default_scope == 'mmpretrain':  # whose model puts this together
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
    """A batch of the recipe's size, of at most 8 images."""
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
                assert inputs.shape[1:] == (3, 512, 512)
                assert all(sample.gt_sem_seg.shape == (512, 512) for sample in samples)
            else:
                check_detection(config, inputs, samples)


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
    """Images have the size to test with; annotations and the size before padding, to clip predictions to, are kept."""
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
                assert (height, width) == inputs.shape[2:] and min(height, width) == 512 and 'gt_sem_seg' in samples[0]
            elif folder == 'vitdet':
                assert inputs.shape[2:] == (1024, 1024) and max(height, width) == 1024
            else:
                assert (
                    min(height, width) == 800 and not inputs[0, :, height:].any() and not inputs[0, :, :, width:].any()
                )


@lru_cache(maxsize=None)
def learning_rates(schedulers, rate, epoch, total):
    """The rate at every step of a training; what repeats among recipes is computed once."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.SGD([parameter], lr=rate))
    schedulers = [
        PARAM_SCHEDULERS.build(cfg, default_args=dict(optimizer=wrapper, epoch_length=epoch))
        for cfg in json.loads(schedulers)
    ]
    wrapper.optimizer.step()  # before the schedulers', as in a training
    group, rates = wrapper.param_groups[0], []
    for step in range(total):
        rates.append(group['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or (step + 1) % epoch == 0:
                scheduler.step()
    return rates


def expected(name, config, epoch):
    """(step, factor of the recipe's rate) of the originals."""
    if name.startswith('vit/plainvit-') and 'in1k' in name:
        return []  # for evaluation; nobody's recipe
    if 'in1k' in name:
        warm_up, last = 70 if 'mvitv2' in name else 5, 1e-5 / config.optim_wrapper.optimizer.lr
        cosines = {at: (1 + math.cos(math.pi * (at - warm_up) / (300 - warm_up))) / 2 for at in (100, 200, 299)}
        return [(warm_up * epoch, 1), *((at * epoch, last + (1 - last) * cosine) for at, cosine in cosines.items())]
    if 'ade20k' in name:
        total = 160000 if '160k' in name else 80000
        start, power = (0, 0.9) if '_fpn_' in name else (1500, 1)
        return [(start, 1), ((start + total) // 2, 0.5**power), ((start + 3 * total) // 4, 0.25**power)]
    if 'deformable' in name:
        return [(0, 1), (40 * epoch - 1, 1), (40 * epoch, 0.1)]
    long = '3x' in name
    if 'scalablevit' in name:
        warm_up, steps = 500, [at * epoch for at in ((27, 33) if long else (8, 11))]
    elif 'mpvit' in name or 'retinanet' in name:
        warm_up, steps = 1000, (210000, 250000) if long else (60000, 80000)
    elif 'vitae' in name:
        warm_up, steps = 250, (22 * epoch, 24 * epoch)
    elif 'mvitv2' in name:
        warm_up, steps = 250, (52500, 62500) if long else (81944, 88773)
    elif 'lvis' in name:
        warm_up, steps = 250, (138889, 150463)
    else:
        warm_up, steps = 250, (122916, 133159) if 'huge' in name else (163889, 177546)
    first, second = steps
    return [(warm_up, 1), (first - 1, 1), (first, 0.1), (second - 1, 0.1), (second, 0.01)]


def test_learning_rates_at_milestones(subtests):
    for name in RECIPES:
        config = read_config(name)
        epoch = steps_of_epoch(config)
        loop = config.train_cfg
        total = loop.max_iters if 'max_iters' in loop else loop.max_epochs * epoch
        schedulers = config.param_scheduler
        for cfg in schedulers if isinstance(schedulers, list) else [schedulers]:
            cfg.setdefault('end', loop.max_epochs if cfg.get('by_epoch', True) else total)
        rate = config.optim_wrapper.optimizer.lr
        text = json.dumps(config._cfg_dict.to_dict()['param_scheduler'])
        with subtests.test(name):
            rates = learning_rates(text, rate, epoch, total)
            assert max(rates) == pytest.approx(rate) and min(rates) >= 0
            for step, factor in expected(name, config, epoch):
                assert rates[step] == pytest.approx(factor * rate, rel=1e-3), (step, rates[step] / rate)
