"""NormRPNHead against RPNHead and a plain reference; losses and predictions of Detectron2CascadeRoIHead."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.models import RPNHead
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmvitzoo.models.heads import Detectron2CascadeRoIHead, NormRPNHead


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Resets the default scope, which other tests change."""
    init_default_scope('mmdet')


pytestmark = pytest.mark.stack

NORM = dict(type='LayerNorm2d', eps=1e-6)


def build(head_type=NormRPNHead, **kwargs):
    torch.manual_seed(0)
    return head_type(in_channels=8, feat_channels=12, **kwargs).double()


def feature_maps():
    torch.manual_seed(1)
    return [torch.randn(2, 8, side, side + 1, dtype=torch.float64) for side in (8, 4)]


@pytest.mark.parametrize('num_convs', [1, 2])
def test_without_norm_equals_rpn_head(num_convs):
    head, reference = build(num_convs=num_convs), build(RPNHead, num_convs=num_convs)
    for value in reference.parameters():
        nn.init.normal_(value)
    assert list(head.state_dict()) == list(reference.state_dict())
    head.load_state_dict(reference.state_dict(), strict=True)
    for levels, expected in zip(head(feature_maps()), reference(feature_maps())):
        assert len(levels) == 2 and all(torch.equal(a, b) for a, b in zip(levels, expected))


@pytest.mark.parametrize('num_convs', [1, 2, 3])
def test_norm_follows_every_hidden_convolution(num_convs):
    head = build(num_convs=num_convs, norm_cfg=NORM)
    hidden = [f'rpn_conv.{i}.{name}' for i in range(num_convs) for name in ('conv.weight', 'ln.weight', 'ln.bias')]
    outer = [f'{layer}.{name}' for layer in ('rpn_cls', 'rpn_reg') for name in ('weight', 'bias')]
    assert list(head.state_dict()) == hidden + outer
    for value in head.parameters():  # small conv weights make eps matter; norms are not the identity
        nn.init.normal_(value, std=0.01 if value.dim() == 4 else 1.0)
    weights = head.state_dict()
    cls_scores, bbox_preds = head(feature_maps())
    for x, cls_score, bbox_pred in zip(feature_maps(), cls_scores, bbox_preds):
        for i in range(num_convs):
            x = F.conv2d(x, weights[f'rpn_conv.{i}.conv.weight'], padding=1)
            centered = x - x.mean(1, keepdim=True)
            x = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
            scale, shift = weights[f'rpn_conv.{i}.ln.weight'], weights[f'rpn_conv.{i}.ln.bias']
            x = (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
        for layer, output in (('rpn_cls', cls_score), ('rpn_reg', bbox_pred)):
            torch.testing.assert_close(output, F.conv2d(x, weights[f'{layer}.weight'], weights[f'{layer}.bias']))


@pytest.mark.parametrize(
    'norm_cfg, norm_type', [(dict(type='BN'), nn.BatchNorm2d), (dict(type='GN', num_groups=4), nn.GroupNorm)]
)
def test_other_norms(norm_cfg, norm_type):
    head = build(num_convs=2, norm_cfg=norm_cfg)
    norms = [layer.norm for layer in head.rpn_conv]
    assert len(norms) == 2 and all(isinstance(norm, norm_type) for norm in norms)
    head(feature_maps())


def test_gradients_reach_every_parameter():
    head = build(num_convs=2, norm_cfg=NORM).train()
    sum((out * torch.randn_like(out)).sum() for levels in head(feature_maps()) for out in levels).backward()
    for name, value in head.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name


def test_initialization_equals_rpn_head():
    torch.manual_seed(0)
    head = NormRPNHead(in_channels=32, feat_channels=32, num_convs=2, norm_cfg=NORM)
    head.init_weights()
    for layer in head.rpn_conv:
        assert layer.conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert (layer.norm.weight == 1).all() and (layer.norm.bias == 0).all()


@pytest.mark.parametrize('name', ['NormRPNHead', 'mmvitzoo.NormRPNHead'])
def test_build_from_registry(name):
    head = MODELS.build(dict(type=name, in_channels=8, feat_channels=8, norm_cfg=NORM))
    assert type(head) is NormRPNHead and isinstance(head, RPNHead)
    assert head.rpn_conv[0].with_norm


CASCADE = Path(__file__).resolve().parents[3] / 'configs/mpvit/cascade-mask-rcnn_mpvit-small_fpn_ms-3x_coco.py'


def cascade(stage_loss_weights):
    model = Config.fromfile(CASCADE).model
    assert model.roi_head.type == 'Detectron2CascadeRoIHead'
    model.roi_head.stage_loss_weights = stage_loss_weights
    for head in model.roi_head.bbox_head:  # the full heads take 0.2 GB
        head.fc_out_channels = 16
    torch.manual_seed(0)
    return MODELS.build(dict(model.roi_head, train_cfg=model.train_cfg.rcnn, test_cfg=model.test_cfg.rcnn))


def image():
    """Returns feature maps, proposals and ground truth of an image with two objects."""
    torch.manual_seed(1)
    feature_maps = tuple(torch.randn(1, 256, 16 >> i, 24 >> i) for i in range(4))
    boxes = torch.tensor([[8.0, 8, 56, 40], [40, 20, 90, 60]])
    masks = np.zeros((2, 64, 96), np.uint8)
    masks[0, 8:40, 8:56] = masks[1, 20:60, 40:90] = 1
    sample = DetDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1, 1)))
    labels = torch.tensor([3, 7])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks, 64, 96))
    return feature_maps, [InstanceData(bboxes=boxes.repeat(8, 1) + 4 * torch.randn(16, 4))], [sample]


def test_cascade_trains_one_mask_head_in_first_stage():
    weighted, unweighted = cascade([1 / 3] * 3), cascade([1, 1, 1])
    unweighted.load_state_dict(weighted.state_dict())
    losses = []
    for head in (weighted, unweighted):
        data = image()
        torch.manual_seed(2)  # sampling of proposals is random
        losses.append(head.train().loss(*data))
    names = {f's{i}.{name}' for i in range(3) for name in ('loss_cls', 'acc', 'loss_bbox')}
    assert losses[0].keys() == {*names, 's0.loss_mask'}
    assert type(weighted) is Detectron2CascadeRoIHead and type(weighted.mask_head).__name__ == 'FCNMaskHead'
    torch.testing.assert_close(losses[0]['s0.loss_mask'], losses[1]['s0.loss_mask'])
    for i in range(3):
        torch.testing.assert_close(3 * losses[0][f's{i}.loss_cls'], losses[1][f's{i}.loss_cls'])
    sum(value for name, value in losses[0].items() if 'loss' in name).backward()
    assert all(x.grad is not None for x in weighted.parameters())


def test_cascade_loss_without_objects():
    head = cascade([1 / 3] * 3).train()
    feature_maps, proposals, samples = image()
    samples[0].gt_instances = samples[0].gt_instances[torch.zeros(2, dtype=torch.bool)]
    losses = head.loss(feature_maps, proposals, samples)
    assert losses['s0.loss_mask'] == 0 and all(losses[f's{i}.loss_cls'] > 0 for i in range(3))
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    # Distributed training hangs if a parameter of one process has no gradient.
    assert all(x.grad is not None and x.grad.isfinite().all() for x in head.parameters())


def test_number_of_proposals_in_each_stage():
    head = cascade([1 / 3] * 3).train()
    feature_maps, proposals, samples = image()
    counts = []
    bbox_loss = head.bbox_loss

    def counting_bbox_loss(stage, x, sampling_results):
        counts.append(len(sampling_results[0].priors))
        return bbox_loss(stage, x, sampling_results)

    head.bbox_loss = counting_bbox_loss
    head.loss(feature_maps, proposals, samples)
    # 16 proposals and, in the first stage only, 2 ground truth boxes.
    assert counts == [18, 16, 16]


@torch.no_grad()
@pytest.mark.parametrize('with_mask', [True, False])
def test_cascade_predicts_boxes_and_masks(with_mask):
    head = cascade([1 / 3] * 3).eval()
    feature_maps, proposals, samples = image()
    if not with_mask:
        del head.mask_head
    scores, deltas, *masks = head(feature_maps, proposals, samples)
    assert scores[0].shape == (16, 81) and deltas[0].shape == (16, 4)
    assert [x[0].shape for x in masks] == ([(16, 80, 28, 28)] if with_mask else [])
    torch.testing.assert_close(scores[0].exp().sum(1), torch.ones(16))
    head.test_cfg.score_thr, head.test_cfg.max_per_img = 0, 10
    result = head.predict(feature_maps, proposals, samples, rescale=True)[0]
    assert len(result) and ('masks' in result) == with_mask
    assert not with_mask or result.masks.shape == (len(result), 64, 96)
