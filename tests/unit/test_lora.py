"""Low-rank updates: their mathematics, and detectors that train, save, load and resume with them."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from forms import VIT_ARCH, slim
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn
from torch.func import functional_call

import mmvitzoo
import mmvitzoo.engine.layer_decay  # registers the constructor
from mmvitzoo.checkpoints import CheckpointError, export, load_pretrained, match_names, save
from mmvitzoo.engine import add_lora, merge_lora
from mmvitzoo.models import PlainViT, TimmBackbone

QKV = [dict(type='qkv')]
VIT = dict(type='PlainViT', arch=VIT_ARCH, img_size=64)


def lora_backbone(module=VIT, **kwargs):
    return dict(type='LoRABackbone', module=module, **dict(dict(targets=QKV, rank=4, alpha=8), **kwargs))


def randomize_updates(model):
    """Gives the second factors of all updates values, as if they were trained."""
    for name, value in model.named_parameters():
        if 'lora_up' in name:
            nn.init.normal_(value, std=0.1)
    return model


def trained(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


# ---------------------------------------------------------------- mathematics


@pytest.mark.parametrize('form', ['vitdet', 'mvitv2', 'scalablevit', 'mpvit', 'vitae'])
def test_features_and_gradients_equal_those_of_the_formula(form):
    """The weight of a layer is W + alpha / rank * B A; nothing else has a gradient."""
    plain = slim(form).double().eval()
    model = randomize_updates(add_lora(deepcopy(plain), ['.*(qkv|q|fc1)', 'proj'], rank=3, alpha=6)).eval()
    factors = {name: value.detach().requires_grad_() for name, value in model.named_parameters() if 'lora_' in name}
    weights = dict(plain.named_parameters())
    for name in factors:
        if name.endswith('.lora_up.weight'):
            layer = name[: -len('.lora_up.weight')]
            update = factors[name] @ factors[f'{layer}.lora_down.weight']
            weights[f'{layer}.weight'] = weights[f'{layer}.weight'].detach() + 6 / 3 * update
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = functional_call(plain, weights, (x,))
    outs = model(x)
    for out, y in zip(outs, expected):
        torch.testing.assert_close(out, y, rtol=1e-10, atol=1e-10)
    for maps in (outs, expected):
        sum((y * y.detach().cos()).sum() for y in maps).backward()
    assert trained(model) == {name for name, value in model.named_parameters() if value.grad is not None} == {*factors}
    for name, value in model.named_parameters():
        if name in factors:
            torch.testing.assert_close(value.grad, factors[name].grad, rtol=1e-8, atol=1e-10, msg=name)


def test_merged_equals_unmerged():
    model = randomize_updates(add_lora(slim('dinov2'), ['qkv', 'fc2'], rank=4, alpha=8)).eval()
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        expected = model(x)[-1]
        merged = merge_lora(model)(x)[-1]
        assert (merged - expected).norm() <= 1e-6 * expected.norm()
        plain = slim('dinov2').eval()
        assert merged.sub(plain(x)[-1]).abs().max() > 1e-2
        plain.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(plain(x)[-1], merged)
        optimized = mmvitzoo.optimize_for_inference(model)
        assert type(optimized.blocks[0].attn).__name__ == 'Attention' and not hasattr(optimized.blocks[0].attn, 'qkv')
        torch.testing.assert_close(optimized(x)[-1], merged, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='PlainViT has no low-rank updates to merge'):
        merge_lora(model)


def test_number_of_parameters():
    """12 blocks, rank 8, 768 inputs and 3 * 768 outputs."""
    with torch.device('meta'):
        model = MODELS.build(lora_backbone(dict(type='PlainViT', arch='base'), rank=8))
    assert sum(x.numel() for x in model.parameters() if x.requires_grad) == 12 * 8 * (768 + 2304) == 294912


def test_dropout_in_training_alone():
    model = randomize_updates(MODELS.build(lora_backbone(dropout=0.5)))
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_options_of_a_target():
    """The first target that fits counts; a target has its own options, in MMPretrain's names as well."""
    targets = [dict(type='proj', rank=2, alpha=1), dict(type=r'blocks\.[01]\.attn\..*', dropout=0.25)]
    model = MODELS.build(dict(type='LoRABackbone', module=VIT, targets=targets, rank=4, alpha=8, dropout=0.5))
    layers = {name: x for name, x in model.named_modules() if type(x).__name__ == 'LoRALinear'}
    options = {name: (x.lora_up.weight.shape[1], x.scaling, x.lora_dropout.p) for name, x in layers.items()}
    proj = {f'blocks.{i}.attn.proj': (2, 0.5, 0.5) for i in range(4)}
    assert options == {**proj, **{f'blocks.{i}.attn.qkv': (4, 2, 0.25) for i in range(2)}}
    assert isinstance(model, PlainViT) and model.out_channels == (48,) * 4  # the contract of the backbone


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(targets=[dict(type='qkv'), dict(type='query')]),
            "'query' fits no linear layer of PlainViT; it has "
            'blocks.0.attn.qkv, blocks.0.attn.proj, blocks.0.mlp.fc1, blocks.0.mlp.fc2',
        ),
        (dict(targets=['*qkv']), r"'\*qkv' is no regular expression"),
        (dict(targets=[dict(type='qkv', r=4)]), 'a target is a name or a dict of type, rank, alpha, dropout'),
        (dict(targets=[]), 'at least one name, got'),
        (dict(targets='qkv'), "at least one name, got 'qkv'"),
        (dict(targets=['']), 'a target is a name or a dict'),
        (dict(rank=None), 'rank is a number of at least 1, got None'),
        (dict(alpha=0), 'alpha is a number above 0, got 0'),
        (dict(dropout=1), 'dropout is at least 0 and less than 1, got 1'),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(lora_backbone(**options))


def test_layers_that_are_read_instead_of_called_are_no_targets():
    with pytest.raises(ValueError, match='TransformerEncoderLayer; it has linear1, linear2'):
        add_lora(nn.TransformerEncoderLayer(8, 2), ['out_proj'], rank=2)


@pytest.mark.parametrize(
    'name, options',
    [
        ('beit_base_patch16_224', dict(embed_dim=48, depth=1, num_heads=3, img_size=64)),
        ('eva02_tiny_patch14_224', dict(embed_dim=48, depth=1, num_heads=3)),
        ('swinv2_tiny_window8_256', dict(embed_dim=24, depths=(1, 1), num_heads=(1, 2), img_size=64)),
    ],
)
def test_timm_calls_the_layers(name, options):
    """These attentions of timm read the weight of qkv, unless they are told to add the bias separately."""
    torch.manual_seed(0)
    plain = TimmBackbone(name, **options).eval()
    for parameter in plain.parameters():  # some norms start at zero
        nn.init.normal_(parameter, std=0.3)
    model = randomize_updates(add_lora(deepcopy(plain), ['qkv'], rank=2, alpha=4))
    x = torch.randn(1, 3, 64, 64)
    out = model(x)[-1]
    out.square().sum().backward()
    assert all(value.grad.any() for value in model.parameters() if value.requires_grad)
    assert (out - plain(x)[-1]).abs().max() > 1e-3
    torch.testing.assert_close(merge_lora(model)(x)[-1], out, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize('source', ['timm', 'mmpretrain', None])
def test_starts_as_the_pretrained_backbone(source, tmp_path):
    """``init_cfg`` loads any layout; without it the weights are initialized, and the update is zero."""
    torch.manual_seed(0)
    module = dict(VIT)
    if source:
        weights = {f'backbone.{key}': torch.randn_like(x) for key, x in PlainViT(VIT_ARCH, 64).state_dict().items()}
        save(export(weights, 'plainvit', source), tmp_path / 'vit.pth')
        module['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'))
    model = MODELS.build(lora_backbone(module))
    model.init_weights()
    lora = {key for key in model.state_dict() if 'lora_' in key}
    assert len(lora) == 8 and all((model.state_dict()[key] == 0).all() == ('lora_up' in key) for key in lora)
    if source:
        assert all(
            torch.equal(x, weights[f'backbone.{key}']) for key, x in model.state_dict().items() if key not in lora
        )


@pytest.mark.parametrize('frozen_stages', [-1, 1])
def test_frozen_stages_and_layer_decay(frozen_stages):
    """Updates of frozen stages are frozen; the others have the learning rate of their block."""
    model = nn.Module()
    model.backbone = MODELS.build(lora_backbone(dict(VIT, frozen_stages=frozen_stages))).train()
    model.head = nn.Linear(48, 2)
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='SGD', lr=1.0, weight_decay=0.1),
            constructor='BackboneLayerDecay',
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    rates = {group['param_name']: group['lr'] for group in wrapper.optimizer.param_groups}
    layers = {i: f'backbone.blocks.{i}.attn.qkv' for i in range(4) if i >= frozen_stages}
    expected = {f'{name}.lora_{x}.weight': 0.5 ** (4 - i) for i, name in layers.items() for x in ('down', 'up')}
    assert rates == {**expected, 'head.weight': 1, 'head.bias': 1}


# ---------------------------------------------------------------- detectors


DETECTOR = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[127.5] * 3, std=[50] * 3),
    backbone=lora_backbone(dict(VIT, with_cp=True, drop_path_rate=0.1), dropout=0.1),
    neck=dict(type='SimpleFeaturePyramid', in_channels=48, out_channels=8),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=2,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    ),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4), allowed_border=-1, pos_weight=-1
    ),
)


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Registers MMDetection's models, and resets the default scope, which other tests change."""
    import mmdet.models  # noqa: F401

    init_default_scope('mmdet')


def random_samples():
    """Returns four images with one object each."""
    from mmdet.structures import DetDataSample

    torch.manual_seed(0)
    meta = dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1, 1))
    samples = []
    for _ in range(4):
        gt = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))
        sample = DetDataSample(metainfo=meta, gt_instances=gt)
        samples.append(dict(inputs=torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), data_samples=sample))
    return samples


def train(folder, resume=None):
    """Trains two epochs of two iterations with a moving average, or resumes that; returns the runner."""
    runner = Runner(
        deepcopy(DETECTOR),
        str(folder),
        dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler'), dataset=random_samples()),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        custom_hooks=[dict(type='EMAHook', momentum=0.1), dict(type='ExactResumeHook')],
        randomness=dict(seed=0),
        default_scope='mmdet',
        experiment_name=folder.name,
        load_from=resume,
        resume=bool(resume),
    )
    runner.train()
    return runner


def test_detector_trains_and_resumes_exactly(tmp_path):
    """Activation checkpointing, drop paths, dropout and a moving average are on; the checkpoint holds everything."""
    model = train(tmp_path / 'whole').model
    train(tmp_path / 'resumed', str(tmp_path / 'whole/epoch_1.pth'))
    first, whole, resumed = (
        torch.load(tmp_path / file, weights_only=False)
        for file in ('whole/epoch_1.pth', 'whole/epoch_2.pth', 'resumed/epoch_2.pth')
    )
    for key in ('state_dict', 'ema_state_dict'):
        assert whole[key].keys() == resumed[key].keys()
        assert all(torch.equal(value, resumed[key][name]) for name, value in whole[key].items())
    assert whole['state_dict'].keys() == model.state_dict().keys()
    changed = {name for name, x in whole['state_dict'].items() if not torch.equal(x, first['state_dict'][name])}
    assert changed == trained(model) and {name for name in changed if 'backbone' not in name}


def test_loading_reports_what_is_missing_elsewhere():
    model = MODELS.build(DETECTOR)
    weights = model.state_dict()
    del weights['neck.fpn_convs.0.conv.weight'], weights['backbone.norm.bias']
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ['backbone.norm.bias', 'neck.fpn_convs.0.conv.weight'] and not unexpected


def test_updates_are_not_lost_in_a_model_without_them(tmp_path):
    """A backbone refuses a checkpoint with updates as ``load_from``, and as ``init_cfg``."""
    weights = MODELS.build(DETECTOR).state_dict()
    plain = MODELS.build(dict(DETECTOR, backbone=VIT))
    with pytest.raises(CheckpointError, match='lora_down.weight is a low-rank update; tools/merge_lora.py merges it'):
        match_names(plain, weights)
    assert match_names(plain, merge_lora(MODELS.build(DETECTOR)).state_dict())
    for module in (VIT, dict(type='TimmBackbone', model_name='vit_tiny_patch16_224', depth=1)):
        torch.save(MODELS.build(lora_backbone(module)).state_dict(), tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match='is a low-rank update'):
            load_pretrained(MODELS.build(module), str(tmp_path / 'a.pth'))


def test_distributed_data_parallel():
    """Every trainable parameter gets a gradient in every step; DDP raises an error in the second step otherwise."""
    model = MODELS.build(lora_backbone(dict(VIT, with_cp=True)))
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel(torch.randn(1, 3, 64, 64))[0].sum().backward()
    finally:
        dist.destroy_process_group()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
