"""Every config builds, has the size that follows from its architecture, and computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    str(path.relative_to(ROOT / 'configs')) for path in ROOT.glob('configs/*/*.py') if path.parent.name != '_base_'
)

# Of the authors' classifiers and of timm's. What else is published is compared in test_zoo.py.
PARAMS = {
    'mpvit-tiny_8xb128_in1k': 5843736,
    'mpvit-xsmall_8xb128_in1k': 10573448,
    'mpvit-small_8xb128_in1k': 22892400,
    'mpvit-base_8xb128_in1k': 74845976,
    'plainvit-tiny_in1k': 5717416,
    'plainvit-small_in1k': 22050664,
    'plainvit-base_in1k': 86567656,
    'plainvit-large_in1k': 304326632,
    'mvitv2-tiny_8xb256_in1k': 24173320,
    'mvitv2-small_8xb256_in1k': 34870216,
    'mvitv2-base_8xb256_in1k': 51472744,
    'mvitv2-large_8xb256_in1k': 217992952,
}
LISTED = {
    model['Name']: model['Metadata']['Parameters']
    for path in ROOT.glob('configs/*/metafile.yml')
    for model in yaml.safe_load(path.read_text())['Models']
}
# MMSegmentation's configs of the same rows, with its own backbone.
MMSEG = {
    f'{ours}_8xb2-{schedule}_ade20k-512x512.py': f'mmseg::vit/vit_{theirs}_8xb2-{schedule}_ade20k-512x512.py'
    for ours, theirs, schedules in (
        ('plainvit-base_mln_upernet', 'vit-b16_mln_upernet', ('80k', '160k')),
        ('plainvit-base-ln_mln_upernet', 'vit-b16-ln_mln_upernet', ('160k',)),
        ('deit-small_upernet', 'deit-s16_upernet', ('80k', '160k')),
        ('deit-small_mln_upernet', 'deit-s16_mln_upernet', ('160k',)),
        ('deit-small-ln_mln_upernet', 'deit-s16-ln_mln_upernet', ('160k',)),
        ('deit-base_upernet', 'deit-b16_upernet', ('80k', '160k')),
        ('deit-base_mln_upernet', 'deit-b16_mln_upernet', ('160k',)),
        ('deit-base-ln_mln_upernet', 'deit-b16-ln_mln_upernet', ('160k',)),
    )
    for schedule in schedules
}
MODULE2PACKAGE['mmseg'] = 'mmseg'  # what tools/train.py does for the second stack
DROP_PATH = {'tiny': 0.1, 'xsmall': 0.1, 'small': 0.2, 'base': 0.4}
CLASSIFIER_DROP_PATH = {'tiny': 0, 'xsmall': 0, 'small': 0.05, 'base': 0.3}


def from_package(name):
    return Config.fromstring(f'_base_ = [{name!r}]', '.py')


def without_scope(config):
    """As a config is written; one from another package names its scope in every dict."""
    if isinstance(config, dict):
        return {key: without_scope(value) for key, value in config.items() if key != '_scope_'}
    return [without_scope(value) for value in config] if isinstance(config, (list, tuple)) else config


def build(name, tmp_path):
    config = Config.fromfile(ROOT / 'configs' / name)
    init_default_scope(config.default_scope)
    config.model.backbone.pop('init_cfg', None)  # a file of the authors
    if config.default_scope == 'mmdet':
        # These would pad the small images to 1024.
        config.model.data_preprocessor.pop('batch_augments', None)
        config.model.data_preprocessor.pad_size_divisor = 32
    if 'lvis' in name:
        (tmp_path / 'lvis.json').write_text(
            json.dumps(dict(categories=[dict(id=i, image_count=i) for i in range(1203)]))
        )
        config.model.roi_head.bbox_head.loss_cls.ann_file = str(tmp_path / 'lvis.json')
    if 'data_preprocessor' in config:  # MMPretrain's, which the Runner hands to the model
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return config, model


def test_there_are_configs():
    assert len(CONFIGS) == 93 and len(MMSEG) == 11


@pytest.mark.stack
@pytest.mark.parametrize('name', CONFIGS)
def test_builds_and_computes(name, tmp_path):
    config, model = build(name, tmp_path)
    params = sum(p.numel() for p in model.parameters())
    assert params == LISTED[Path(name).stem] == PARAMS.get(Path(name).stem, params)
    if name[len('vit/') :] in MMSEG:
        peer = MODELS.build(from_package(MMSEG[name[len('vit/') :]]).model)
        # MMSegmentation 1.2 leaves out the bias of the patch embedding, which its checkpoints have.
        ours, theirs = (
            sum(p.numel() for name, p in x.named_parameters() if not name.endswith('.projection.bias'))
            for x in (model, peer)
        )
        assert ours == theirs
    # Two images of 64 x 96 for the loss: a BatchNorm needs several values at stride 32.
    if config.default_scope == 'mmpretrain':
        check_classifier(model)
    elif config.default_scope == 'mmseg':
        check_segmentor(model)
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
    assert result[0].pred_score.shape == (model.head.num_classes,)


def check_segmentor(model):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    size = model.data_preprocessor.size
    meta = dict(img_shape=(96, 96), ori_shape=(96, 96), pad_shape=(96, 96), scale_factor=(1, 1), flip=False)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 10, (1, 96, 96)))
        samples.append(sample)
    data = dict(inputs=[torch.randint(0, 255, (3, 96, 96), dtype=torch.uint8)] * 2, data_samples=samples)
    assert size in ((512, 512), (160, 160))
    model.data_preprocessor.size = (96, 96)
    model.train()
    losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    assert losses['decode.loss_ce'].isfinite() and ('aux.loss_ce' in losses) == model.with_auxiliary_head
    model.eval()
    with torch.no_grad():
        result = model(
            **model.data_preprocessor(dict(inputs=data['inputs'][:1], data_samples=samples[:1])), mode='predict'
        )
    assert result[0].pred_sem_seg.data.shape == (1, 96, 96)


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


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.startswith('mpvit/') and 'mini' not in name])
def test_recipe_of_mpvit(name):
    """The authors' values, as the configs resolve them."""
    config = Config.fromfile(ROOT / 'configs' / name)
    backbone, wrapper = config.model.backbone, config.optim_wrapper
    arch, optimizer = backbone.arch, wrapper.optimizer
    assert optimizer.type == 'AdamW'
    if 'in1k' in name:
        assert backbone.get('drop_path_rate', 0) == CLASSIFIER_DROP_PATH[arch]
        assert (optimizer.lr, optimizer.weight_decay, config.train_dataloader.batch_size) == (1e-3, 0.05, 128)
        assert [x['end'] if 'end' in x else x['begin'] for x in config.param_scheduler] == [5, 5]
        assert config.train_cfg.max_epochs == 300
        return
    assert backbone.drop_path_rate == (0.5 if 'cascade' in name and arch == 'base' else DROP_PATH[arch])
    assert backbone.norm_cfg.type == 'SyncBN' and config.train_dataloader.batch_size == 2
    assert backbone.init_cfg.checkpoint == f'checkpoints/mpvit_{arch}.pth'
    if 'ade20k' in name:
        assert (optimizer.lr, optimizer.weight_decay, config.train_cfg.max_iters) == (6e-5, 0.01, 160000)
        assert config.model.decode_head.channels == 512 and config.model.auxiliary_head.in_index == 2
        return
    if 'deformable' in name:
        assert (optimizer.lr, optimizer.weight_decay, wrapper.clip_grad.max_norm) == (2e-4, 1e-4, 0.1)
        multipliers = {key: value.lr_mult for key, value in wrapper.paramwise_cfg.custom_keys.items()}
        assert multipliers == dict(backbone=0.1, sampling_offsets=0.1, reference_points=0.1)
        assert backbone.out_indices == (1, 2, 3) and config.auto_scale_lr.base_batch_size == 32
        assert not config.model.with_box_refine and not config.model.as_two_stage and config.model.num_queries == 300
        return
    assert (optimizer.lr, optimizer.weight_decay, wrapper.clip_grad.max_norm) == (1e-4, 0.05, 1.0)
    warm_up, steps = config.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.01, 1000)
    long = 'ms-3x' in name
    assert config.train_cfg.max_iters == (270000 if long else 90000)
    assert steps.milestones == ([210000, 250000] if long else [60000, 80000])
    assert config.train_dataloader.sampler.type == 'InfiniteSampler'
    transforms = [x['type'] for x in config.train_dataloader.dataset.pipeline]
    assert ('RandomChoice' in transforms) == long and ('Resize' in transforms) != long
    assert ('mask' in str(config.train_dataloader.dataset.pipeline)) == ('mask-rcnn' in name)
    if 'cascade' in name:
        head = config.model.roi_head
        assert [box.type for box in head.bbox_head] == ['Shared2FCBBoxHead'] * 3
        assert head.stage_loss_weights == [1 / 3] * 3 and len(config.model.train_cfg.rcnn) == 3


@pytest.mark.parametrize('name', MMSEG)
def test_recipe_is_that_of_mmsegmentation(name):
    """All that is not the backbone resolves to the same as in its config."""
    ours, theirs = Config.fromfile(ROOT / 'configs' / 'vit' / name), from_package(MMSEG[name])
    ours, theirs = (ConfigDict(without_scope(config._cfg_dict)) for config in (ours, theirs))
    for key in ('train_dataloader', 'val_dataloader', 'optim_wrapper'):
        assert ours[key] == theirs[key], key
    # Its file for DeiT-S and 160k inherits the schedule of 80k.
    iterations = 160000 if '160k' in name else 80000
    assert ours.train_cfg.max_iters == ours.param_scheduler[1]['end'] == iterations
    assert ours.default_hooks.checkpoint.interval == ours.train_cfg.val_interval == iterations // 10
    if 'deit-small_upernet' not in name:
        assert ours.train_cfg == theirs.train_cfg and ours.param_scheduler == theirs.param_scheduler
    for key in ('decode_head', 'auxiliary_head', 'test_cfg'):
        assert ours.model[key] == theirs.model[key], key
    assert ours.model.get('neck') == theirs.model.get('neck')
    backbone, peer = ours.model.backbone, theirs.model.backbone
    assert backbone.out_indices == peer.out_indices and backbone.final_norm == peer.get('final_norm', False)
    assert backbone.get('drop_path_rate', 0) == peer.drop_path_rate
    assert backbone.init_cfg.checkpoint.startswith('checkpoints/' + ('deit' if 'deit' in name else 'jx_vit'))


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.startswith('vitdet/') and 'mini' not in name])
def test_recipe_of_vitdet(name):
    config = Config.fromfile(ROOT / 'configs' / name)
    backbone, wrapper = config.model.backbone, config.optim_wrapper
    size = next(size for size in ('small', 'base', 'large', 'huge') if size in name)
    lvis = 'lvis' in name
    optimizer = wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 2e-4 if lvis else 1e-4, 0.1)
    assert wrapper.type == 'AmpOptimWrapper' and wrapper.constructor == 'BackboneLayerDecay'
    paramwise = wrapper.paramwise_cfg
    assert paramwise.layer_decay_rate == dict(small=0.7, base=0.7, large=0.8, huge=0.9)[size]
    assert ('norm_decay_mult' in paramwise) == ('custom_keys' in paramwise) == (size != 'huge')
    assert backbone.drop_path_rate == dict(small=0.1, base=0.1, large=0.4, huge=0.5)[size]
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 64
    transforms = {x['type']: x for x in config.train_pipeline}
    assert transforms['RandomResize'].ratio_range == (0.1, 2.0) and transforms['RandomCrop'].crop_size == (1024, 1024)
    dataset = config.train_dataloader.dataset
    assert dataset.get('dataset', dataset).pipeline == config.train_pipeline
    warm_up, steps = config.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.001, 250)
    if 'vitae' in name:
        assert (config.train_cfg.max_epochs, steps.milestones, dataset.times) == (25, [22, 24], 4)
        assert 'max_iters' not in config.train_cfg
        return
    iterations = 156250 if lvis else 138281 if size == 'huge' else 184375
    assert config.train_cfg.max_iters == steps.end == iterations
    assert [round(step / iterations, 3) for step in steps.milestones] == [0.889, 0.963]
    assert backbone.pretrain_img_size == 224 and backbone.img_size == 1024 and backbone.window_size == 14
    depth = dict(base=12, large=24, huge=32)[size]
    across = tuple(depth * i // 4 - 1 for i in (1, 2, 3, 4))
    if 'conv' in name:
        assert (backbone.global_attn_indexes, backbone.residual_block_indexes) == ((), across)
    else:
        assert backbone.global_attn_indexes == across and 'residual_block_indexes' not in backbone
    if lvis:
        assert (dataset.type, dataset.oversample_thr) == ('ClassBalancedDataset', 1e-3)
        assert (config.model.test_cfg.rcnn.max_per_img, config.model.test_cfg.rcnn.score_thr) == (300, 0.02)
        assert config.model.roi_head.bbox_head.loss_cls.type == 'FederatedLoss'


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base', 'large'])
def test_recipe_of_mvitv2_is_that_of_mmpretrain(arch):
    """All but the class of the backbone and the weight decay resolves to the same as in its config."""
    name = f'mvitv2-{arch}_8xb256_in1k.py'
    ours, theirs = Config.fromfile(ROOT / 'configs' / 'mvitv2' / name), from_package(f'mmpretrain::mvit/{name}')
    assert ours.custom_imports == dict(imports=['mmvitzoo']) and ours.model.backbone.type == 'MViTv2'
    ours, theirs = (without_scope(config._cfg_dict) for config in (ours, theirs))
    del ours['custom_imports'], theirs['model']['backbone']['type'], ours['model']['backbone']['type']
    # The authors' for all; MMPretrain has it for the base variant alone.
    assert ours['optim_wrapper']['optimizer'].pop('weight_decay') == 0.05
    assert theirs['optim_wrapper']['optimizer'].pop('weight_decay') == (0.05 if arch == 'base' else 0.3)
    assert ours == theirs
    assert ours['model']['backbone']['drop_path_rate'] == dict(tiny=0.1, small=0.1, base=0.3, large=0.5)[arch]


@pytest.mark.parametrize(
    'name', [name for name in CONFIGS if 'mvitv2' in name and '_coco' in name and '-coco' not in name]
)
def test_recipe_of_mvitv2_detectors(name):
    config = Config.fromfile(ROOT / 'configs' / name)
    backbone, optimizer = config.model.backbone, config.optim_wrapper.optimizer
    arch = next(arch for arch in ('tiny', 'small', 'base', 'large', 'huge') if arch in name)
    assert (backbone.type, backbone.arch, backbone.window_attention) == ('MViTv2', arch, True)
    assert backbone.drop_path_rate == dict(tiny=0.2, small=0.2, base=0.4, large=0.5, huge=0.6)[arch]
    source = f'{arch[0].upper()}_in' + ('21k_without-token.pth' if 'in21k' in name else '1k.pyth')
    assert backbone.init_cfg.checkpoint == f'checkpoints/MViTv2_{source}'
    assert (optimizer.type, optimizer.weight_decay) == ('AdamW', 0.1)
    paramwise = config.optim_wrapper.paramwise_cfg
    assert paramwise.norm_decay_mult == paramwise.custom_keys.rel_pos.decay_mult == 0
    if 'retinanet' in name:
        # Every norm has a reader: DistributedDataParallel refuses parameters without a gradient.
        assert backbone.out_indices == (1, 2, 3) and config.model.neck.start_level == 0
        assert config.train_cfg.max_iters == 90000 and optimizer.lr == 1e-4
        return
    assert backbone.out_indices == (0, 1, 2, 3)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 64
    large = arch == 'large'
    iterations, steps = (92187, [81944, 88773]) if large else (67500, [52500, 62500])
    assert optimizer.lr == (1e-4 if large else 1.6e-4) and config.optim_wrapper.type == 'AmpOptimWrapper'
    assert config.train_cfg.max_iters == config.param_scheduler[1].end == iterations
    assert config.param_scheduler[1].milestones == steps
    transforms = {x['type']: x for x in config.train_dataloader.dataset.pipeline}
    if 'lsj' in name:
        assert transforms['RandomCrop'].crop_size == (1024, 1024)
        assert config.model.data_preprocessor.batch_augments[0].size == (1024, 1024)
    else:
        assert 'RandomChoice' in transforms and 'batch_augments' not in config.model.data_preprocessor
    assert config.test_pipeline[1].scale == (1333, 800)
    assert bool(backbone.get('with_cp')) == (arch == 'huge')
    head = config.model.roi_head
    if 'cascade' in name:
        assert [box.norm_cfg.type for box in head.bbox_head] == 3 * [head.mask_head.norm_cfg.type] == 3 * ['SyncBN']
        assert config.model.rpn_head.num_convs == 2 and all(box.reg_class_agnostic for box in head.bbox_head)
        overlaps = [stage.assigner.pos_iou_thr for stage in config.model.train_cfg.rcnn]
        assert overlaps == [0.5, 0.6, 0.7] and head.stage_loss_weights == 3 * [1 / 3]
    else:
        assert head.bbox_head.type == 'Shared2FCBBoxHead' and 'norm_cfg' not in head.mask_head


@pytest.mark.parametrize(
    'name', [name for name in CONFIGS if name.startswith('scalablevit/') and not name.endswith('mini-coco.py')]
)
def test_recipe_of_scalablevit(name):
    """The repository's for classification, customary ones for what was not released."""
    config = Config.fromfile(ROOT / 'configs' / name)
    backbone, optimizer = config.model.backbone, config.optim_wrapper.optimizer
    arch = next(arch for arch in ('small', 'base', 'large') if arch in name)
    assert (backbone.type, backbone.arch, optimizer.type) == ('ScalableViT', arch, 'AdamW')
    if 'in1k' in name:
        assert backbone.drop_path_rate == dict(small=0.2, base=0.5, large=0.5)[arch]
        assert (optimizer.lr, optimizer.weight_decay, config.optim_wrapper.clip_grad.max_norm) == (1e-3, 0.05, 5.0)
        warm_up, cosine = config.param_scheduler
        assert (warm_up.end, warm_up.start_factor, cosine.eta_min) == (5, 1e-3, 1e-5)
        assert config.train_cfg.max_epochs == 300 and config.train_dataloader.batch_size == 128
        return
    assert backbone.drop_path_rate == dict(small=0.2, base=0.3, large=0.4)[arch]
    assert backbone.init_cfg.checkpoint == f'checkpoints/scalablevit_{arch}.pth'
    assert config.train_dataloader.batch_size == 2
    if 'ade20k' in name:
        long = 'upernet' in name
        assert (optimizer.lr, optimizer.weight_decay) == ((6e-5, 0.01) if long else (1e-4, 1e-4))
        assert config.train_cfg.max_iters == config.param_scheduler[-1].end == (160000 if long else 80000)
        assert config.param_scheduler[-1].power == (1.0 if long else 0.9)
        assert config.model.decode_head.num_classes == 150
        return
    assert (optimizer.lr, optimizer.weight_decay) == (1e-4, 0.05)
    long = 'ms-3x' in name
    assert config.train_cfg.max_epochs == (36 if long else 12)
    assert config.param_scheduler[1].milestones == ([27, 33] if long else [8, 11])
    transforms = [x['type'] for x in config.train_dataloader.dataset.pipeline]
    assert ('RandomChoiceResize' in transforms) == long and ('Resize' in transforms) != long
    if 'retinanet' in name:
        # Every norm has a reader: DistributedDataParallel refuses parameters without a gradient.
        assert backbone.out_indices == (1, 2, 3) and config.model.neck.start_level == 0


@pytest.mark.stack
def test_names_resolve_in_every_toolbox():
    import mmdet.registry
    import mmpretrain.registry
    import mmseg.registry

    archs = dict(MPViT='tiny', MViTv2='tiny', PlainViT='tiny', ScalableViT='small', ViTAE='small')
    for toolbox in (mmdet, mmpretrain, mmseg):
        init_default_scope(toolbox.__name__)
        for name in (*archs, 'SimpleFeaturePyramid', 'FederatedLoss', 'LayerNorm2d'):
            assert toolbox.registry.MODELS.get(name).__name__ == name
            assert toolbox.registry.MODELS.get(f'mmvitzoo.{name}').__name__ == name
        for name, arch in archs.items():
            for full in (name, f'mmvitzoo.{name}'):
                assert type(MODELS.build(dict(type=full, arch=arch))).__name__ == name


def test_layer_decay_of_mmpretrain(tmp_path):
    from mmengine.optim import build_optim_wrapper

    _, model = build('mpvit/mpvit-tiny_8xb128_in1k.py', tmp_path)
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
