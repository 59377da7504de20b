"""Whole detectors of Detectron2: every weight is converted, and heads compute what Detectron2 computes."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2_names import BATCH_NORM, fpn, heads, retinanet
from forms import FORMS, slim
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvitzoo.checkpoints import CheckpointError, convert, export

pytestmark = pytest.mark.stack
CONFIGS = Path(__file__).resolve().parents[3] / 'configs'
CASCADE = ('.0', '.1', '.2')
CHANNELS = dict(mpvit=FORMS['mpvit'].channels, mvitv2=FORMS['mvitv2'].channels)


def slim_backbone(form, **kwargs):
    """Returns the weights of a slim backbone in Detectron2's names."""
    converted = convert(slim(form, **kwargs).state_dict())
    return export(converted.state_dict, converted.family, 'detectron2')


def detector(name, backbone, around):
    """Builds the detector of a config with the weights of a backbone and of the parts around it.

    Returns the weights in Detectron2's names and the model.
    """
    # Scaled so that activations stay in range.
    around = {key: x / math.sqrt(x[0].numel()) if x.dim() > 1 else x for key, x in around.items()}
    weights = {**backbone, **around}
    converted = convert(weights)
    assert converted.source == 'detectron2'
    config = Config.fromfile(CONFIGS / name)
    config.model.backbone = converted.backbone_cfg
    if converted.family == 'plainvit':
        config.model.neck.in_channels = 96
        config.model.rpn_head.norm_cfg = None  # as in Detectron2's released detectors
    else:
        config.model.neck.in_channels = list(CHANNELS[converted.family][-len(config.model.neck.in_channels) :])
    box_heads = config.model.get('roi_head', {}).get('bbox_head', [])
    for head in box_heads if isinstance(box_heads, list) else [box_heads]:
        head.fc_out_channels = 128
    init_default_scope('mmdet')
    model = MODELS.build(config.model).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    return weights, model


@pytest.fixture(scope='module')
def retina():
    torch.manual_seed(0)
    around = retinanet(CHANNELS['mpvit'][1:])
    return detector('mpvit/retinanet_mpvit-tiny_fpn_1x_coco.py', slim_backbone('mpvit'), around)


@pytest.fixture(scope='module')
def mvitv2_retina():
    torch.manual_seed(0)
    backbone = slim_backbone('mvitv2_windows', out_indices=(1, 2, 3))
    around = retinanet(CHANNELS['mvitv2'][1:])
    return detector('mvitv2/retinanet_mvitv2-tiny_fpn_1x_coco.py', backbone, around)


@pytest.fixture(scope='module')
def mask_rcnn():
    torch.manual_seed(0)
    around = {**fpn(CHANNELS['mpvit']), **heads(box_convs=0, rpn_convs=1, hidden=128)}
    return detector('mpvit/mask-rcnn_mpvit-tiny_fpn_1x_coco.py', slim_backbone('mpvit'), around)


@pytest.fixture(scope='module')
def cascade():
    """Cascade Mask R-CNN with BatchNorm in its heads and two convolutions in its RPN."""
    torch.manual_seed(0)
    around = {**fpn(CHANNELS['mvitv2']), **heads(CASCADE, norm=BATCH_NORM, hidden=128)}
    around.update({key: x.abs() + 0.1 for key, x in around.items() if key.endswith('running_var')})
    return detector('mvitv2/cascade-mask-rcnn_mvitv2-tiny_fpn_ms-3x_coco.py', slim_backbone('mvitv2_windows'), around)


@pytest.fixture(scope='module')
def vitdet(load_golden):
    """Mask R-CNN with LayerNorm after the convolutions of its heads."""
    torch.manual_seed(0)
    around = heads(norm=('weight', 'bias'), hidden=128)
    backbone = {f'backbone.{key}': x for key, x in load_golden('vitdet_d2_small').state_dict.items()}
    return detector('vitdet/mask-rcnn_plainvit-base-mae_lsj-100e_coco.py', backbone, around)


def conv(weights, name, x, **kwargs):
    weight = weights[f'{name}.weight']
    x = F.conv2d(x, weight, weights.get(f'{name}.bias'), padding=weight.shape[-1] // 2, **kwargs)
    if f'{name}.norm.weight' not in weights:
        return x
    norm = {leaf: weights.get(f'{name}.norm.{leaf}') for leaf in ('weight', 'bias', 'running_mean', 'running_var')}
    norm = {leaf: None if value is None else value[:, None, None] for leaf, value in norm.items()}
    if norm['running_var'] is None:
        centered = x - x.mean(1, keepdim=True)
        x = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
    else:
        x = (x - norm['running_mean']) / (norm['running_var'] + 1e-5).sqrt()
    return x * norm['weight'] + norm['bias']


def linear(weights, name, x):
    return F.linear(x, weights[f'{name}.weight'], weights[f'{name}.bias'])


def box_head(weights, name, x):
    for layer in ('conv1', 'conv2', 'conv3', 'conv4', 'fc1', 'fc2'):
        if f'{name}.{layer}.weight' in weights:
            function = conv if 'conv' in layer else linear
            x = function(weights, f'{name}.{layer}', x if 'conv' in layer else x.flatten(1)).relu()
    return x


def pyramid(weights, maps, first):
    """Computes Detectron2's FPN."""
    outs, above = [], None
    for level in reversed(range(first, first + len(maps))):
        lateral = conv(weights, f'backbone.fpn_lateral{level}', maps[level - first])
        above = lateral if above is None else lateral + F.interpolate(above, scale_factor=2, mode='nearest')
        outs.insert(0, conv(weights, f'backbone.fpn_output{level}', above))
    return outs


def anchors(height, width, stride, sizes, ratios=(0.5, 1, 2)):
    """Returns Detectron2's anchors, (H * W * A, 4), centered on corners of cells: by row, column, size, ratio."""
    cells = []
    for size in sizes:
        for ratio in ratios:
            wide = math.sqrt(size**2 / ratio)
            tall = ratio * wide
            cells.append([-wide / 2, -tall / 2, wide / 2, tall / 2])
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing='ij')
    return (torch.stack([x, y, x, y], -1)[:, :, None] + torch.tensor(cells)).flatten(0, 2)


def decoded(deltas, boxes, weights=(1, 1, 1, 1)):
    """Decodes Detectron2's boxes: deltas relative to center and size, sizes at most 62.5 times as large."""
    size = boxes[:, 2:] - boxes[:, :2]
    center = boxes[:, :2] + size / 2
    deltas = deltas / torch.tensor(weights)
    center = center + deltas[:, :2] * size
    size = size * deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([center - size / 2, center + size / 2], -1)


def by_anchor(x, channels):
    """(1, A * channels, H, W) -> (H * W * A, channels), the order in which both frameworks read the maps of heads."""
    return x[0].unflatten(0, (-1, channels)).permute(2, 3, 0, 1).flatten(0, 2)


def same(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def same_boxes(coder, deltas, theirs, boxes, weights=(1, 1, 1, 1)):
    """Compares boxes, except the few with a side below 1/62.5 of the anchor's: MMDetection clips those."""
    usual = (theirs[:, 2:] / torch.tensor(weights[2:]) > -math.log(1000 / 16)).all(1)
    assert usual.float().mean() > 0.9
    same(coder.decode(boxes, deltas)[usual], decoded(theirs, boxes, weights)[usual])


@torch.no_grad()
@pytest.mark.parametrize('name, widths', [('retina', CHANNELS['mpvit']), ('mvitv2_retina', CHANNELS['mvitv2'][1:])])
def test_retinanet(name, widths, request):
    weights, model = request.getfixturevalue(name)
    maps = [torch.randn(1, width, 32 >> i, 48 >> i) for i, width in enumerate(widths)]
    levels = pyramid(weights, maps[-3:], first=3)
    levels.append(conv(weights, 'backbone.top_block.p6', maps[-1], stride=2))
    levels.append(conv(weights, 'backbone.top_block.p7', levels[-1].relu(), stride=2))
    ours = model.neck(maps)
    scores, deltas = model.bbox_head(ours)
    priors = model.bbox_head.prior_generator.grid_priors([x.shape[2:] for x in ours], device='cpu')
    for i, level in enumerate(levels):
        same(ours[i], level)
        logits = boxes = level
        for layer in (0, 2, 4, 6):
            logits = conv(weights, f'head.cls_subnet.{layer}', logits).relu()
            boxes = conv(weights, f'head.bbox_subnet.{layer}', boxes).relu()
        logits, boxes = conv(weights, 'head.cls_score', logits), conv(weights, 'head.bbox_pred', boxes)
        stride = 8 << i
        expected = anchors(*level.shape[2:], stride, [4 * stride * 2 ** (j / 3) for j in range(3)])
        # MMDetection orders the nine anchors of a location by ratio, then by size.
        expected, logits, boxes = (
            x.unflatten(0, (-1, 3, 3)).transpose(1, 2).flatten(0, 2)
            for x in (expected, by_anchor(logits, 80), by_anchor(boxes, 4))
        )
        same(priors[i], expected)
        same(by_anchor(scores[i], 80), logits)
        same_boxes(model.bbox_head.bbox_coder, by_anchor(deltas[i], 4), boxes, expected)


@torch.no_grad()
@pytest.mark.parametrize('name, widths', [('mask_rcnn', CHANNELS['mpvit']), ('cascade', CHANNELS['mvitv2'])])
def test_rpn(name, widths, request):
    weights, model = request.getfixturevalue(name)
    maps = [torch.randn(1, width, 32 >> i, 24 >> i) for i, width in enumerate(widths)]
    levels = pyramid(weights, maps, first=2)
    levels.append(levels[-1][..., ::2, ::2])
    ours = model.neck(maps)
    scores, deltas = model.rpn_head(ours)
    priors = model.rpn_head.prior_generator.grid_priors([x.shape[2:] for x in ours], device='cpu')
    for i, level in enumerate(levels):
        same(ours[i], level)
        hidden = level
        for layer in ('conv', 'conv.conv0', 'conv.conv1'):  # a single convolution, or two
            layer = f'proposal_generator.rpn_head.{layer}'
            if f'{layer}.weight' in weights:
                hidden = conv(weights, layer, hidden).relu()
        expected = anchors(*level.shape[2:], 4 << i, [32 << i])
        same(priors[i], expected)
        same(scores[i], conv(weights, 'proposal_generator.rpn_head.objectness_logits', hidden))
        boxes = conv(weights, 'proposal_generator.rpn_head.anchor_deltas', hidden)
        same_boxes(model.rpn_head.bbox_coder, by_anchor(deltas[i], 4), by_anchor(boxes, 4), expected)


# Detector, stage of its heads, Detectron2's suffix of the stage, and weights of the box deltas; see also test_cascade.
HEADS = [
    ('mask_rcnn', None, '', (10, 10, 5, 5)),
    ('vitdet', None, '', (10, 10, 5, 5)),
    ('cascade', 1, '.1', (20, 20, 10, 10)),
]


@torch.no_grad()
@pytest.mark.parametrize('name, stage, theirs, scale', HEADS)
def test_box_head(name, stage, theirs, scale, request):
    weights, model = request.getfixturevalue(name)
    head = model.roi_head.bbox_head if stage is None else model.roi_head.bbox_head[stage]
    regions = torch.randn(5, 256, 7, 7)
    x = box_head(weights, f'roi_heads.box_head{theirs}', regions)
    scores, deltas = head(regions)
    same(scores, linear(weights, f'roi_heads.box_predictor{theirs}.cls_score', x))  # classes, then the background
    boxes = linear(weights, f'roi_heads.box_predictor{theirs}.bbox_pred', x)
    assert boxes.shape[1] == (320 if stage is None else 4)
    proposals = torch.tensor([[10.0, 20, 50, 40]]).repeat(5, 1)
    for start in (0, boxes.shape[1] - 4):
        of_class = slice(start, start + 4)
        same_boxes(head.bbox_coder, deltas[:, of_class], boxes[:, of_class], proposals, scale)


@torch.no_grad()
@pytest.mark.parametrize('name', ['mask_rcnn', 'vitdet', 'cascade'])
def test_mask_head(name, request):
    weights, model = request.getfixturevalue(name)
    x = regions = torch.randn(3, 256, 14, 14)
    for i in range(1, 5):
        x = conv(weights, f'roi_heads.mask_head.mask_fcn{i}', x).relu()
    deconv = 'roi_heads.mask_head.deconv'
    x = F.conv_transpose2d(x, weights[f'{deconv}.weight'], weights[f'{deconv}.bias'], stride=2).relu()
    same(model.roi_head.mask_head(regions), conv(weights, 'roi_heads.mask_head.predictor', x))


@torch.no_grad()
def test_cascade(cascade):
    """Each stage refines the boxes, clipped to the image, for the next; class probabilities are averaged."""
    weights, model = cascade
    head, levels = model.roi_head, [torch.randn(1, 256, 32 >> i, 48 >> i) for i in range(4)]
    boxes = torch.tensor([[4.0, 6, 100, 90], [30, 20, 190, 120], [0, 0, 60, 60]])
    meta = dict(img_shape=(128, 192), ori_shape=(128, 192), scale_factor=(1.0, 1.0))
    rois, scores, deltas = head._refine_roi(levels, F.pad(boxes, (1, 0)), [meta], (3,))
    probabilities = 0
    for stage, scale in enumerate([(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]):
        if stage == 2:
            same(rois[0][:, 1:], boxes)
        regions = head.bbox_roi_extractor[stage](levels, F.pad(boxes, (1, 0)))
        x = box_head(weights, f'roi_heads.box_head.{stage}', regions)
        predictor = f'roi_heads.box_predictor.{stage}'
        probabilities = probabilities + linear(weights, f'{predictor}.cls_score', x).softmax(-1) / 3
        moves = linear(weights, f'{predictor}.bbox_pred', x)
        boxes = decoded(moves, boxes, scale).clamp(min=0)
        boxes = torch.minimum(boxes, torch.tensor([192.0, 128, 192, 128]))
    same(deltas[0], moves)
    same(scores[0].softmax(-1), probabilities)


def test_pasted_masks(mask_rcnn):
    """Each pixel's center samples the mask bilinearly in the box's coordinates; the threshold is 0.5."""
    _, model = mask_rcnn
    logits, box = torch.randn(1, 80, 28, 28), torch.tensor([[7.3, 4.9, 41.2, 22.6]])
    meta = dict(img_shape=(32, 48), ori_shape=(32, 48), scale_factor=(1.0, 1.0))
    masks = model.roi_head.mask_head._predict_by_feat_single(
        logits, box, torch.tensor([3]), meta, model.roi_head.test_cfg
    )
    (left, top, right, bottom), probability = box[0], logits[:, 3:4].sigmoid()
    y = (torch.arange(32) + 0.5 - top) / (bottom - top) * 2 - 1
    x = (torch.arange(48) + 0.5 - left) / (right - left) * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], -1)[None]
    assert torch.equal(masks[0], F.grid_sample(probability, grid, align_corners=False)[0, 0] >= 0.5)


def test_retinanet_without_nine_anchors_is_refused():
    weights = {'backbone.bottom_up.blocks.0.attn.pool_q.weight': torch.zeros(1)}
    weights.update({'head.cls_score.weight': torch.zeros(8, 256, 3, 3)})
    with pytest.raises(CheckpointError, match=r'retina_cls.weight has shape \(8, .*, expected 3 sizes x 3 ratios'):
        convert(weights)
