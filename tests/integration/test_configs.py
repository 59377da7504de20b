"""All configs: inheritance, number of parameters, and a training and an inference step of each kind of model."""

import ctypes
import gc
import json
import re
from functools import lru_cache

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from zoo_configs import (
    FOLDERS,
    LISTED,
    NAMES,
    ROOT,
    as_text,
    backbone_of,
    bases,
    group_by,
    module_types,
    read_config,
    read_stock_config,
    size,
    without_scope,
)

from mmvitzoo.models import PlainViT

# MMSegmentation's configs of the same models, with its own backbone.
MMSEG = {
    f'vit/{ours}_8xb2-{schedule}_ade20k-512x512.py': f'mmseg::vit/vit_{theirs}_8xb2-{schedule}_ade20k-512x512.py'
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


def count(model, without=()):
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith(without or '\0'))


def build_on_meta(config):
    init_default_scope(config.default_scope)
    with torch.device('meta'):
        return MODELS.build(config.model)


@lru_cache(maxsize=None)
def count_of_mmsegmentation(model):
    """Counts the parameters of a model of MMSegmentation, whose constructor needs real tensors."""
    init_default_scope('mmseg')
    return count(MODELS.build(json.loads(model)), without='.projection.bias')


def levels(path):
    """Counts the levels of inheritance of a config; a toolbox's file counts as one level."""
    return 1 + max((1 if '::' in base else levels((path.parent / base).resolve()) for base in bases(path)), default=0)


def test_inheritance(subtests):
    """Configs have at most three levels, no base in another family's folder, and ``_base_`` has no unused file."""
    root, used = ROOT / 'configs', set()
    paths = sorted(root.rglob('*.py'))
    for path in paths:
        with subtests.test(str(path.relative_to(root))):
            ours = [(path.parent / base).resolve().relative_to(root) for base in bases(path) if '::' not in base]
            assert levels(path) <= 3
            assert {base.parts[0] for base in ours} <= {'_base_', path.relative_to(root).parts[0]}
            used.update(ours)
    assert {path.relative_to(root) for path in paths if '_base_' in path.parts} <= used


def modules_after_backbone(model):
    """Returns the configs of the modules that take the backbone's maps: the neck, or heads."""
    if 'in_channels' in (model.get('neck') or {}):
        return [model.neck]
    return [model[name] for name in ('decode_head', 'auxiliary_head', 'head') if name in model]


@pytest.mark.stack
@pytest.mark.parametrize('folder', FOLDERS)
def test_parameters_and_channels(folder, subtests):
    """Each model has the number of parameters in its metafile, and its neck or heads have the backbone's channels."""
    for name in (name for name in NAMES if name.startswith(f'{folder}/')):
        with subtests.test(name):
            config = read_config(name)
            model = build_on_meta(config)
            assert count(model) == LISTED[name]['Metadata']['Parameters']
            backbone = model.backbone
            maps = [backbone.out_channels[i] for i in backbone.out_indices]
            for module in modules_after_backbone(config.model):
                one_map = isinstance(module.in_channels, int)
                assert module.in_channels == (maps[module.get('in_index', -1)] if one_map else maps), module.type


def test_base_batch_size():
    """``auto_scale_lr`` has the batch size of the recipe: images per GPU times the GPUs in the file name, or 8 GPUs."""
    for name in NAMES:
        config = read_config(name)
        if 'auto_scale_lr' in config and 'mini' not in name:
            gpus = 16 if '_16xb' in name else 8
            expected = gpus * config.train_dataloader.batch_size
            assert config.auto_scale_lr.base_batch_size == expected, name


def build_trainable(name, tmp_path):
    """Builds a model with random weights for images of 64 x 96 pixels."""
    config = read_config(name)
    init_default_scope(config.default_scope)
    backbone_of(config).pop('init_cfg', None)  # names a file of the authors
    if config.default_scope == 'mmdet':
        # Do not pad the small images to 1024 pixels.
        config.model.data_preprocessor.pop('batch_augments', None)
        config.model.data_preprocessor.pad_size_divisor = 32
        few_regions(config.model)
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
    return model


def few_regions(model):
    """Limits the regions of a two-stage detector, which take most of its time and memory here."""
    if 'rpn_head' in model:
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 20
        model.test_cfg.rcnn.max_per_img = 10
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 8


def free_memory():
    """Gives the memory of deleted models back to the system; the C library would keep it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'malloc_trim'):
        libc.malloc_trim(0)


@pytest.mark.stack
@pytest.mark.parametrize('folder', FOLDERS)
def test_training_and_inference_step(folder, subtests, tmp_path):
    """The smallest model of each kind gives finite losses, gradients of all parameters and predictions."""
    checks = dict(mmpretrain=check_classifier, mmseg=check_segmentor, mmdet=check_detector)
    for members in group_by(module_types, NAMES):
        name = min(members, key=size)
        if name.startswith(f'{folder}/'):
            with subtests.test(f'{name} for {", ".join(members)}'):
                checks[read_config(name).default_scope](build_trainable(name, tmp_path))
            free_memory()


def check_gradients(model, losses):
    """Checks that every parameter has a gradient, since DistributedDataParallel refuses others."""
    total = sum(
        x.sum()
        for key, value in losses.items()
        if 'loss' in key
        for x in (value if isinstance(value, list) else [value])
    )
    assert total.isfinite()
    missing = {p: name for name, p in model.named_parameters() if p.requires_grad}

    def discard(p):  # immediately, since all gradients together take as much memory as the model
        del missing[p]
        p.grad = None

    for p in missing:
        p.register_post_accumulate_grad_hook(discard)
    total.backward()
    assert not list(missing.values())


# The loss takes two images of 64 x 96 pixels: BatchNorm needs several values at stride 32.


def check_classifier(model):
    from mmpretrain.structures import DataSample

    model.train()
    data = dict(
        inputs=torch.randint(0, 255, (2, 3, 64, 96)), data_samples=[DataSample().set_gt_label(i) for i in (1, 2)]
    )
    check_gradients(model, model(**model.data_preprocessor(data, training=True), mode='loss'))
    model.eval()
    one = dict(inputs=data['inputs'][:1], data_samples=data['data_samples'][:1])
    with torch.no_grad():
        result = model(**model.data_preprocessor(one), mode='predict')
    assert result[0].pred_score.shape == (model.head.num_classes,)


def check_segmentor(model):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    meta = dict(img_shape=(96, 96), ori_shape=(96, 96), pad_shape=(96, 96), scale_factor=(1, 1), flip=False)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 10, (1, 96, 96)))
        samples.append(sample)
    data = dict(inputs=[torch.randint(0, 255, (3, 96, 96), dtype=torch.uint8)] * 2, data_samples=samples)
    model.data_preprocessor.size = (96, 96)
    model.train()
    losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    assert ('aux.loss_ce' in losses) == model.with_auxiliary_head
    check_gradients(model, losses)
    model.eval()
    one = dict(inputs=data['inputs'][:1], data_samples=samples[:1])
    with torch.no_grad():
        result = model(**model.data_preprocessor(one), mode='predict')
    assert result[0].pred_sem_seg.data.shape == (1, 96, 96)


def check_detector(model):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    samples = []
    for _ in range(2):
        masks = np.zeros((1, 64, 96), np.uint8)
        masks[:, 8:40, 8:56] = 1
        gt = InstanceData(
            bboxes=torch.tensor([[8.0, 8, 56, 40]]), labels=torch.tensor([0]), masks=BitmapMasks(masks, 64, 96)
        )
        meta = dict(img_shape=(64, 96), ori_shape=(64, 96), batch_input_shape=(64, 96), scale_factor=(1, 1), img_id=0)
        samples.append(DetDataSample(metainfo=meta, gt_instances=gt))
    shape = (model.backbone.in_channels, 64, 96)
    data = dict(inputs=[torch.randint(0, 255, shape, dtype=torch.uint8)] * 2, data_samples=samples)
    model.train()
    check_gradients(model, model(**model.data_preprocessor(data, training=True), mode='loss'))
    model.eval()
    one = dict(inputs=data['inputs'][:1], data_samples=samples[:1])
    with torch.no_grad():
        result = model(**model.data_preprocessor(one), mode='predict')[0].pred_instances
    assert result.bboxes.isfinite().all()
    assert not model.with_mask or result.masks.shape[1:] == (64, 96)


@pytest.mark.stack
@pytest.mark.parametrize('name', MMSEG)
def test_equals_the_config_of_mmsegmentation(name):
    """Everything but the backbone equals MMSegmentation's config; the backbone has as many parameters."""
    config, stock = read_config(name), read_stock_config(MMSEG[name])
    # The patch embedding of MMSegmentation 1.2 has no bias, unlike that of its checkpoints.
    without = dict(pretrained=None, drop_path_rate=0)
    model = dict(stock.model, backbone=dict(stock.model.backbone, **without), data_preprocessor=None, pretrained=None)
    assert count(build_on_meta(config), without='.patch_embed.proj.bias') == count_of_mmsegmentation(as_text(model))

    ours, theirs = (ConfigDict(without_scope(x._cfg_dict)) for x in (config, stock))
    for key in ('train_dataloader', 'val_dataloader', 'optim_wrapper'):
        assert ours[key] == theirs[key], key
    # MMSegmentation's DeiT-S config for 160k inherits the 80k schedule.
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


@pytest.mark.stack
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base', 'large'])
def test_equals_the_config_of_mmpretrain(arch):
    """Everything but the class of the backbone and the weight decay equals MMPretrain's config."""
    name = f'mvitv2-{arch}_8xb256_in1k.py'
    ours, theirs = read_config(f'mvitv2/{name}'), read_stock_config(f'mmpretrain::mvit/{name}')
    ours, theirs = (without_scope(config._cfg_dict) for config in (ours, theirs))
    del ours['custom_imports'], theirs['model']['backbone']['type'], ours['model']['backbone']['type']
    # MMPretrain has the authors' weight decay only for the base variant.
    assert ours['optim_wrapper']['optimizer'].pop('weight_decay') == 0.05
    assert theirs['optim_wrapper']['optimizer'].pop('weight_decay') == (0.05 if arch == 'base' else 0.3)
    assert ours == theirs


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
            with torch.device('meta'):
                assert type(MODELS.build(dict(type=f'mmvitzoo.{name}', arch=arch))).__name__ == name


@pytest.mark.stack
def test_layer_decay_of_mmpretrain():
    from mmengine.optim import build_optim_wrapper

    model = build_on_meta(read_config('mpvit/mpvit-tiny_8xb128_in1k.py'))
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            constructor='LearningRateDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    rates = {group['param_name']: group['lr'] for group in wrapper.optimizer.param_groups}
    # 10 depths: the stem, 8 of blocks, the head.
    assert rates['head.fc.weight'] == 1
    assert rates['backbone.stages.3.aggregate.conv.weight'] == 0.5
    assert rates['backbone.stages.0.paths.0.blocks.0.attn.qkv.weight'] == 0.5**8
    assert rates['backbone.stem.0.conv.weight'] == 0.5**9


DINO = [name for name in NAMES if 'dinov' in name and 'mini' not in name]
FROZEN = [name for name in DINO if '-frozen' in name or '_linear' in name]


def test_frozen_backbones(subtests):
    """Linear segmentors and ``-frozen`` freeze all blocks; these and LoRA have no layer decay and drop path."""
    for name in DINO:
        with subtests.test(name):
            config, frozen = read_config(name), name in FROZEN
            cfg = backbone_of(config)
            assert cfg.get('frozen_stages', -1) == (PlainViT.arch_zoo[cfg.arch]['num_layers'] if frozen else -1)
            frozen = frozen or config.model.backbone.type == 'LoRABackbone'
            assert (cfg.get('drop_path_rate', 0) == 0) == frozen
            assert (config.optim_wrapper.get('paramwise_cfg', {}).get('layer_decay_rate', 1) == 1) == frozen


# Names of the published files by variant.
DINOV2 = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}{1}_pretrain.pth'
DINOV3 = {
    'small': 'vits16_pretrain_lvd1689m-08c60483',
    'small-plus': 'vits16plus_pretrain_lvd1689m-4057cbaa',
    'base': 'vitb16_pretrain_lvd1689m-73cec8be',
    'large': 'vitl16_pretrain_lvd1689m-8aa4cbdd',
    'huge-plus': 'vith16plus_pretrain_lvd1689m-7c1da9a5',
    '7b': 'vit7b16_pretrain_lvd1689m-a955f4ea',
}


def test_dino_backbones_fit_their_files(subtests):
    """The published file, its variant, registers and rule of positions agree with the name of the config."""
    for name in DINO:
        family, variant = re.search(r'(dinov[23])-([a-z0-9]+(?:-plus)?)', name).groups()
        cfg, registers = backbone_of(read_config(name)), '-reg' in name
        with subtests.test(name):
            assert cfg.arch == ('small' if variant == 'small-plus' else variant.replace('-', '_'))
            assert (cfg.get('ffn_type') == 'swiglu') == (variant in ('giant', '7b') or '-plus' in variant)
            assert cfg.norm_outputs and cfg.layer_scale_init_value == 1e-5
            if family == 'dinov3':
                assert cfg.init_cfg.checkpoint == f'checkpoints/dinov3_{DINOV3[variant]}.pth'
                assert (cfg.pos_type, cfg.num_register_tokens, cfg.norm_eps) == ('rope', 4, 1e-5)
                continue
            assert cfg.init_cfg.checkpoint == DINOV2.format(f'vit{variant[0]}14', '_reg4' if registers else '')
            assert cfg.img_size == 37 * cfg.patch_size
            assert cfg.get('num_register_tokens', 0) == (4 if registers else 0)
            rule = cfg.interpolate_offset, cfg.get('interpolate_antialias', False)
            assert rule == ((0, True) if registers else (0.1, False))
