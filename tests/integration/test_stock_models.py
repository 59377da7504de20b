"""Stock models of MMDetection and MMSegmentation train and test with the operators that are installed.

Nothing here is of this package but, with mmcv-lite, ``mmcv/_ext.py`` (``python -m mmvitzoo.ops install``).
"""

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

MODULE2PACKAGE['mmseg'] = 'mmseg'  # the second stack names its distribution differently
SIZE = 96  # the least for DCN v1, whose compiled kernel refuses maps smaller than its window

DETECTORS = (
    'retinanet/retinanet_r18_fpn_1x_coco.py',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
)
SEGMENTORS = (
    'upernet/upernet_r18_4xb4-160k_ade20k-512x512.py',
    'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
)


def build(scope, name):
    """Builds a stock model for small images, without downloaded weights and with two layers in transformers."""
    model = get_config(f'{scope}::{name}').model
    init_default_scope(scope)
    model.pop('pretrained', None)
    model.backbone.pop('init_cfg', None)
    model.data_preprocessor.pop('batch_augments', None)
    if scope == 'mmseg':
        model.data_preprocessor.size = (SIZE, SIZE)
    if 'num_queries' in model:
        model.num_queries = 50  # the maps have fewer than 300 places
    heads = model.get('roi_head', {}).get('bbox_head', [])
    for head in heads if isinstance(heads, list) else [heads]:  # most of the parameters, without an operator
        head.fc_out_channels = 64
    for part in ('encoder', 'decoder'):
        if part in model:
            model[part].num_layers = 2
    model = MODELS.build(model)
    model.init_weights()
    return revert_sync_batchnorm(model)


def step(model, data):
    """Runs one training step and one test step; returns the predictions."""
    model.train()
    losses = model(**model.data_preprocessor(data, True), mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    assert torch.isfinite(total) and grads and all(torch.isfinite(grad).all() for grad in grads)
    model.eval()
    with torch.no_grad():
        return model.test_step(data)


def detect(name):
    torch.manual_seed(0)
    data = demo_mm_inputs(
        1, [[3, SIZE, SIZE]], num_items=[3], num_classes=80, with_mask='mask' in name, use_box_type=True
    )
    (result,) = step(build('mmdet', name), data)
    assert result.pred_instances.bboxes.shape[1:] == (4,)
    assert ('masks' in result.pred_instances) == ('mask' in name)


def test_mask_rcnn_with_dcnv2():
    """Covers RoIAlign, NMS and modulated deformable convolutions, forward and backward."""
    detect('dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py')


@pytest.mark.slow
@pytest.mark.parametrize('name', DETECTORS, ids=lambda name: name.split('/')[0])
def test_detector(name):
    detect(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', SEGMENTORS, ids=lambda name: name.split('/')[0])
def test_segmentor(name):
    torch.manual_seed(0)
    sample = SegDataSample(metainfo=dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE)))
    sample.gt_sem_seg = PixelData(data=torch.arange(SIZE).div(16).long().expand(1, SIZE, SIZE))  # four stripes
    data = dict(inputs=[torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)] * 2, data_samples=[sample] * 2)
    result, _ = step(build('mmseg', name), data)
    assert result.pred_sem_seg.shape == (SIZE, SIZE)
