"""Every config builds, has the size that follows from its architecture, and computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    str(path.relative_to(ROOT / 'configs')) for path in ROOT.glob('configs/*/*.py') if path.parent.name != '_base_'
)

# In millions. The classifiers' are the authors'; the detectors' were measured on the authors' code
# in stock heads, except for those of MPViT-XS, whose published 20 and 30 agree.
PARAMS = {
    'mpvit-tiny_8xb128_in1k': 5.843736,
    'mpvit-xsmall_8xb128_in1k': 10.573448,
    'mpvit-small_8xb128_in1k': 22.892400,
    'mpvit-base_8xb128_in1k': 74.845976,
    'retinanet_mpvit-tiny': 15.1,
    'retinanet_mpvit-xsmall': 19.9,
    'retinanet_mpvit-small': 32.3,
    'retinanet_mpvit-base': 84.6,
    'mask-rcnn_mpvit-tiny_fpn_mini': 7.6,
    'mask-rcnn_mpvit-tiny': 25.7,
    'mask-rcnn_mpvit-xsmall': 30.4,
    'mask-rcnn_mpvit-small': 42.7,
    'mask-rcnn_mpvit-base': 94.7,
}
DROP_PATH = {'tiny': 0.1, 'xsmall': 0.1, 'small': 0.2, 'base': 0.4}
CLASSIFIER_DROP_PATH = {'tiny': 0, 'xsmall': 0, 'small': 0.05, 'base': 0.3}


def build(name):
    config = Config.fromfile(ROOT / 'configs' / name)
    init_default_scope(config.default_scope)
    config.model.backbone.pop('init_cfg', None)  # a file of the authors
    if 'data_preprocessor' in config:  # MMPretrain's, which the Runner hands to the model
        config.model.data_preprocessor = config.data_preprocessor
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return config, model


def test_there_are_configs():
    assert len(CONFIGS) == 21


@pytest.mark.stack
@pytest.mark.parametrize('name', CONFIGS)
def test_builds_and_computes(name):
    config, model = build(name)
    expected = next(value for start, value in PARAMS.items() if name.split('/')[1].startswith(start))
    params = sum(p.numel() for p in model.parameters()) / 1e6
    assert params == pytest.approx(expected, abs=0.05 if expected == round(expected, 1) else 1e-6)
    # Two images of 64 x 96 for the loss: a BatchNorm needs several values at stride 32.
    if config.default_scope == 'mmpretrain':
        check_classifier(model)
    else:
        check_detector(model)


def check_classifier(model):
    from mmpretrain.structures import DataSample

    model.train()
    data = dict(
        inputs=torch.randint(0, 255, (2, 3, 64, 96)), data_samples=[DataSample().set_gt_label(i) for i in (1, 2)]
    )
    losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    assert losses['loss'].isfinite()
    model.eval()
    with torch.no_grad():
        result = model(
            **model.data_preprocessor(dict(inputs=data['inputs'][:1], data_samples=data['data_samples'][:1])),
            mode='predict',
        )
    assert result[0].pred_score.shape == (1000,)


def check_detector(model):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    samples = []
    for _ in range(2):
        masks = np.zeros((1, 64, 96), np.uint8)
        masks[:, 8:40, 8:56] = 1
        gt = InstanceData(
            bboxes=torch.tensor([[8.0, 8, 56, 40]]), labels=torch.tensor([3]), masks=BitmapMasks(masks, 64, 96)
        )
        meta = dict(img_shape=(64, 96), ori_shape=(64, 96), batch_input_shape=(64, 96), scale_factor=(1, 1), img_id=0)
        samples.append(DetDataSample(metainfo=meta, gt_instances=gt))
    data = dict(inputs=[torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)] * 2, data_samples=samples)
    model.train()
    losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    total = sum(x.sum() for value in losses.values() for x in (value if isinstance(value, list) else [value]))
    assert total.isfinite()
    model.eval()
    one = dict(inputs=data['inputs'][:1], data_samples=samples[:1])
    with torch.no_grad():
        result = model(**model.data_preprocessor(one), mode='predict')[0].pred_instances
    assert result.bboxes.isfinite().all()
    assert not model.with_mask or result.masks.shape[1:] == (64, 96)


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'mini' not in name])
def test_recipe(name):
    """The authors' values, as the configs resolve them."""
    config = Config.fromfile(ROOT / 'configs' / name)
    arch = config.model.backbone.arch
    optimizer = config.optim_wrapper.optimizer
    assert optimizer.type == 'AdamW' and optimizer.weight_decay == 0.05
    if 'in1k' in name:
        assert config.model.backbone.get('drop_path_rate', 0) == CLASSIFIER_DROP_PATH[arch]
        assert optimizer.lr == 1e-3 and config.train_dataloader.batch_size == 128
        assert [x['end'] if 'end' in x else x['begin'] for x in config.param_scheduler] == [5, 5]
        assert config.train_cfg.max_epochs == 300
        return
    assert config.model.backbone.drop_path_rate == DROP_PATH[arch]
    assert config.model.backbone.norm_cfg.type == 'SyncBN'
    assert config.model.backbone.init_cfg.checkpoint == f'checkpoints/mpvit_{arch}.pth'
    assert optimizer.lr == 1e-4 and config.optim_wrapper.clip_grad.max_norm == 1.0
    warm_up, steps = config.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.01, 1000)
    long = 'ms-3x' in name
    assert config.train_cfg.max_iters == (270000 if long else 90000)
    assert steps.milestones == ([210000, 250000] if long else [60000, 80000])
    assert config.train_dataloader.sampler.type == 'InfiniteSampler' and config.train_dataloader.batch_size == 2
    transforms = [x['type'] for x in config.train_dataloader.dataset.pipeline]
    assert ('RandomChoice' in transforms) == long and ('Resize' in transforms) != long
    assert ('mask' in str(config.train_dataloader.dataset.pipeline)) == name.split('/')[1].startswith('mask')


@pytest.mark.stack
def test_names_resolve_in_every_toolbox():
    import mmdet.registry
    import mmpretrain.registry
    import mmseg.registry

    for toolbox in (mmdet, mmpretrain, mmseg):
        init_default_scope(toolbox.__name__)
        for name in ('MPViT', 'mmvitzoo.MPViT'):
            assert toolbox.registry.MODELS.get(name).__name__ == 'MPViT'
            assert type(MODELS.build(dict(type=name, arch='tiny'))).__name__ == 'MPViT'


def test_layer_decay_of_mmpretrain():
    from mmengine.optim import build_optim_wrapper

    _, model = build('mpvit/mpvit-tiny_8xb128_in1k.py')
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            constructor='LearningRateDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    rates = {group['param_name']: group['lr'] for group in wrapper.optimizer.param_groups}
    # A stem, 8 depths of blocks, a head.
    assert rates['head.fc.weight'] == 1
    assert rates['backbone.stages.3.aggregate.conv.weight'] == 0.5
    assert rates['backbone.stages.0.paths.0.blocks.0.attn.qkv.weight'] == 0.5**8
    assert rates['backbone.stem.0.conv.weight'] == 0.5**9
