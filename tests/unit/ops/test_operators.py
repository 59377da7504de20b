"""Parity of torchvision's operators with compiled mmcv or, if mmcv has no CPU kernel, with reference formulas."""

import importlib.util
import inspect
import re
from itertools import product
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from mmvitzoo.ops import torchvision_ext as ext

DATA = Path(__file__).resolve().parents[2] / 'data'
_spec = importlib.util.spec_from_file_location('make_mmcv_ops', DATA / 'make_mmcv_ops.py')
make_mmcv_ops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_mmcv_ops)
CASES = make_mmcv_ops.CASES
OPERATORS = {name.split('-')[0]: [] for name in CASES}
for name in CASES:
    OPERATORS[name.split('-')[0]].append(name)
COMPILED = sorted(Path(mmcv.__file__).parent.glob('_ext.*.so'))


def compare(name, results, expected):
    """Compares with a tolerance of 1e-6 of the largest value."""
    for result, value in zip(results, expected):
        result, value = result.numpy(), np.asarray(value)
        assert result.shape == value.shape, name
        largest = max(1, np.abs(value).max(initial=0))
        np.testing.assert_allclose(result, value, rtol=0, atol=1e-6 * largest, err_msg=name)


@pytest.fixture(scope='module')
def stored():
    """Loads the stored results of compiled mmcv."""
    with np.load(make_mmcv_ops.PATH) as file:
        return dict(file)


@pytest.mark.stack
@pytest.mark.parametrize('operator', OPERATORS)
def test_equals_stored_results_of_compiled_mmcv(operator, stored):
    for name in OPERATORS[operator]:
        results = CASES[name](ext)
        compare(name, results, [stored[f'{name}/{i}'] for i in range(len(results))])


@pytest.mark.skipif(not COMPILED, reason='this mmcv has no compiled operators')
@pytest.mark.parametrize('operator', OPERATORS)
def test_equals_installed_compiled_mmcv(operator):
    from mmcv import _ext

    for name in OPERATORS[operator]:
        compare(name, CASES[name](ext), CASES[name](_ext))


def test_stored_cases_cover_edge_cases():
    """Cases contain an IoU equal to the threshold, equal scores, suppressed and removed boxes."""
    assert len(CASES['nms_at_threshold-0.5'](ext)[0]) == 14  # pairs with IoU 0.6 to 0.9 lose a box, IoU 0.5 does not
    assert len(CASES['nms_match-0-0.5'](ext)[0]) - 18 == 13  # here IoU 0.5 does, too
    kept, dets = CASES['softnms-80-1-0-0.2-True'](ext)
    assert 10 < len(kept) < 80 and len(dets[:, 4].unique()) < len(kept)


@pytest.mark.stack
def test_signatures_equal_compiled_mmcv():
    path = Path(mmcv.__file__).parent / 'ops/csrc/pytorch/pybind.cpp'
    if not path.exists():
        pytest.skip('this mmcv has no C++ sources')
    functions = inspect.getmembers(ext, inspect.isfunction)
    functions = {name: list(inspect.signature(f).parameters) for name, f in functions if not name.startswith('_')}
    assert len(functions) > 20
    for name, arguments in functions.items():
        definition = re.search(rf'm\.def\("{name}",.*?;', path.read_text(), re.DOTALL)[0]
        assert arguments == re.findall(r'py::arg\("(\w+)"\)', definition), name


@pytest.mark.stack
def test_unsupported_operators_raise_when_called():
    assert not hasattr(ext, '__wrapped__')
    with pytest.raises(NotImplementedError, match=r'^carafe_forward requires compiled mmcv; .*OPS=compiled\)$'):
        ext.carafe_forward(1, key=2)
    with pytest.raises(NotImplementedError, match="pool_mode='max' requires compiled mmcv"):
        ext.roi_align_forward(*[None] * 5, 7, 7, 1.0, 0, 0, True)


def test_origin_is_logged_once_by_main_process(monkeypatch, caplog):
    """Data workers and other ranks do not log it."""

    def import_ext():
        spec = importlib.util.spec_from_file_location('mmcv_ext', ext.__file__)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    import_ext()
    (record,) = caplog.records
    assert re.fullmatch(r'mmcv\.ops: operators come from torchvision \d\S+', record.getMessage())
    with monkeypatch.context() as patch:
        patch.setattr(ext.multiprocessing, 'parent_process', lambda: 'a parent process')
        import_ext()
    monkeypatch.setenv('RANK', '1')
    import_ext()
    assert len(caplog.records) == 1


@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
def test_half_precision_is_computed_in_float32(dtype):
    rng = np.random.RandomState(0)
    half_input, rois = make_mmcv_ops.tensor(rng, 1, 2, 8, 8).to(dtype), torch.tensor([[0, 1, 1, 6, 7.0]])
    results = []
    for x in (half_input, half_input.float()):
        output, grad, none = x.new_zeros(1, 2, 3, 3), torch.zeros_like(x), x.new_zeros(0)
        ext.roi_align_forward(x, rois.to(x), output, none, none, 3, 3, 1.0, 2, 1, True)
        ext.roi_align_backward(output, rois.to(x), none, none, grad, 3, 3, 1.0, 2, 1, True)
        weight, offset, conv = x[:, :, :3, :3].clone(), x.new_full((1, 18, 6, 6), 0.5), x.new_zeros(1, 1, 6, 6)
        ext.deform_conv_forward(x, weight, offset, conv, none, none, 3, 3, 1, 1, 0, 0, 1, 1, 1, 1, 1)
        losses, target = torch.zeros_like(x[0, 0]), torch.arange(8)
        ext.sigmoid_focal_loss_forward(x[0, 0], target, none, losses, 2.0, 0.25)
        boxes = make_mmcv_ops.boxes(np.random.RandomState(1), 30).to(dtype).to(x)
        results.append([output, grad, conv, losses, ext.nms(boxes, boxes[:, 0], 0.5, 0)])
    for half, full in zip(*results):
        assert half.dtype in (dtype, torch.long)
        assert torch.allclose(half.float(), full.float(), rtol=2**-7, atol=1e-2)


def roi_pool(x, rois, size, scale):
    """Implements RoI pooling with the loops of mmcv's CUDA kernel in NumPy."""
    channels, height, width = x.shape[1:]
    output = np.zeros((len(rois), channels, *size), np.float32)
    argmax = np.full(output.shape, -1)
    for n, (image, *box) in enumerate(rois):
        x1, y1, x2, y2 = (np.float32(v * scale) for v in (box[0], box[1], box[2] + 1, box[3] + 1))
        if x2 <= x1 or y2 <= y1:
            continue
        for c, i, j in product(range(channels), range(size[0]), range(size[1])):
            h, w = (y2 - y1) / np.float32(size[0]), (x2 - x1) / np.float32(size[1])
            rows = range(max(int(np.floor(i * h + y1)), 0), min(int(np.ceil((i + 1) * h + y1)), height))
            columns = range(max(int(np.floor(j * w + x1)), 0), min(int(np.ceil((j + 1) * w + x1)), width))
            largest = -np.inf
            for row, column in product(rows, columns):
                if x[int(image), c, row, column] > largest:
                    largest = output[n, c, i, j] = x[int(image), c, row, column]
                    argmax[n, c, i, j] = row * width + column
    return output, argmax


def test_roi_pool_equals_loops():
    """Includes equal values, boxes outside the map and malformed boxes."""
    rng = np.random.RandomState(0)
    x = torch.from_numpy(rng.randint(0, 4, (2, 3, 9, 11)).astype(np.float32))
    rois = [[0, 1, 2, 30, 25], [1, -9, -5, 12, 60], [1, 3, 3, 4, 4], [0, 8, 9, 3, 12], [0, 90, 90, 99, 99]]
    rois = torch.tensor(rois, dtype=torch.float32)
    output, argmax = torch.ones(5, 3, 4, 3), torch.zeros(5, 3, 4, 3, dtype=torch.int)
    ext.roi_pool_forward(x, rois, output, argmax, 4, 3, 0.25)
    expected, indices = roi_pool(x.numpy(), rois.tolist(), (4, 3), 0.25)
    assert np.array_equal(output, expected) and np.array_equal(argmax, indices)
    assert (argmax == -1).any() and (argmax[3] == -1).all()

    grad, grad_input = make_mmcv_ops.tensor(rng, *output.shape), torch.zeros_like(x)
    ext.roi_pool_backward(grad, rois, argmax, grad_input, 4, 3, 0.25)
    expected = np.zeros((2, 3, 99), np.float32)
    for n, c, i, j in zip(*np.nonzero(indices >= 0)):
        expected[int(rois[n, 0]), c, indices[n, c, i, j]] += grad[n, c, i, j]
    np.testing.assert_allclose(grad_input.flatten(2), expected, atol=1e-6)


@pytest.mark.parametrize('gamma, alpha', ((2.0, 0.25), (1.5, 0.6)))
def test_focal_losses_equal_formulas(gamma, alpha):
    """Compares losses and gradients with torchvision and plain PyTorch; the last row is background."""
    logits = make_mmcv_ops.tensor(np.random.RandomState(0), 6, 5).double() * 4
    target, none = torch.tensor([0, 4, 2, 1, 3, 5]), logits.new_zeros(0)
    x = logits.clone().requires_grad_()
    one_hot = F.one_hot(target, 6)[:, :5].double()
    expected = sigmoid_focal_loss(x, one_hot, alpha, gamma)
    loss, grad = torch.zeros_like(logits), torch.zeros_like(logits)
    ext.sigmoid_focal_loss_forward(logits, target, none, loss, gamma, alpha)
    ext.sigmoid_focal_loss_backward(logits, target, none, grad, gamma, alpha)
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert torch.allclose(grad, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-9)

    weight = torch.arange(1, 6).double()
    weighted = torch.zeros_like(loss)
    ext.sigmoid_focal_loss_forward(logits, target, weight, weighted, gamma, alpha)
    assert torch.equal(weighted, loss * torch.tensor([1, 5, 3, 2, 4, 1])[:, None])

    target = target.where(target < 5, torch.tensor(-1))  # rows without a class have no loss
    log_p = F.log_softmax(x, -1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    expected = -alpha * (1 - log_p.exp()) ** gamma * log_p * weight[target] * (target >= 0)
    loss, buffer = logits.new_zeros(6), logits.new_zeros(6)
    ext.softmax_focal_loss_forward(logits.softmax(-1), target, weight, loss, gamma, alpha)
    ext.softmax_focal_loss_backward(logits.softmax(-1), target, weight, buffer, grad, gamma, alpha)
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert torch.allclose(grad, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-9)


def test_focal_losses_are_finite_for_extreme_logits():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    target, none, loss, grad = torch.tensor([0, 0]), torch.zeros(0), torch.zeros(2, 2), torch.zeros(2, 2)
    ext.sigmoid_focal_loss_forward(logits, target, none, loss, 2.0, 0.25)
    ext.sigmoid_focal_loss_backward(logits, target, none, grad, 2.0, 0.25)
    limit = -np.log(ext.TINY)  # mmcv clamps the logarithm of 0 to this value
    np.testing.assert_allclose(loss, [[0, 0], [0.25 * limit, 0.75 * limit]], rtol=1e-6)
    assert torch.isfinite(grad).all()


def bilinear(x, y, feature_map):
    """Samples a feature map (H, W, C) bilinearly, with zeros outside."""
    total = 0
    for j, i in product((int(np.floor(y)), int(np.floor(y)) + 1), (int(np.floor(x)), int(np.floor(x)) + 1)):
        if 0 <= j < feature_map.shape[0] and 0 <= i < feature_map.shape[1]:
            total = total + (1 - abs(y - j)) * (1 - abs(x - i)) * feature_map[j, i]
    return total


@pytest.mark.stack
def test_multi_scale_deformable_attention_equals_loops():
    """Compares outputs with a sum over sampling points, and gradients with finite differences."""
    pytest.importorskip(
        'mmcv.ops', reason='mmcv.ops requires operators: python -m mmvitzoo.ops install', exc_type=ImportError
    )
    rng = np.random.RandomState(0)
    shapes, start = torch.tensor([[4, 5], [2, 3]]), torch.tensor([0, 20])
    value, weight = make_mmcv_ops.tensor(rng, 2, 26, 2, 3).double(), make_mmcv_ops.tensor(rng, 2, 3, 2, 2, 2).double()
    locations = torch.from_numpy(rng.uniform(-0.2, 1.2, (2, 3, 2, 2, 2, 2)))
    output = ext.ms_deform_attn_forward(value, shapes, start, locations, weight, 64)
    expected = torch.zeros(2, 3, 2, 3).double()
    for b, q, head, level, point in product(range(2), range(3), range(2), range(2), range(2)):
        h, w = shapes[level].tolist()
        feature_map = value[b, start[level] : start[level] + h * w, head].view(h, w, 3)
        x, y = (locations[b, q, head, level, point] * torch.tensor([w, h]) - 0.5).tolist()
        expected[b, q, head] += weight[b, q, head, level, point] * bilinear(x, y, feature_map)
    assert torch.allclose(output, expected.flatten(2), rtol=1e-9)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, locations, weight):
            ctx.save_for_backward(value, locations, weight)
            return ext.ms_deform_attn_forward(value, shapes, start, locations, weight, 64)

        @staticmethod
        def backward(ctx, grad):
            value, locations, weight = ctx.saved_tensors
            grads = [torch.zeros_like(x) for x in ctx.saved_tensors]
            ext.ms_deform_attn_backward(value, shapes, start, locations, weight, grad.contiguous(), *grads, 64)
            return tuple(grads)

    inputs = [x.requires_grad_() for x in (value, locations, weight)]
    assert torch.autograd.gradcheck(Attention.apply, inputs)


def test_iou_of_touching_and_equal_rotated_boxes():
    """Clipping is ill-conditioned for boxes with common boundaries."""
    for angle in (0.0, 0.3, np.pi / 2, 2.5):
        cos, sin = np.cos(angle), np.sin(angle)
        shifts = ((0, 0, 1), (10, 0, 0), (5, 0, 1 / 3), (0, 3, 1 / 3), (100, 0, 0))  # x and y along the sides, IoU
        boxes = [[500 + x * cos - y * sin, 300 + x * sin + y * cos, 10, 6, angle] for x, y, _ in shifts]
        boxes += [[500, 300, 10, 3, angle], [500, 300, 6, 10, angle + np.pi / 2], [500, 300, 0, 6, angle]]
        boxes = torch.tensor(boxes, dtype=torch.float64)
        ious = torch.zeros(len(boxes), dtype=torch.float64)
        ext.box_iou_rotated(boxes[:1].expand_as(boxes), boxes, ious, mode_flag=0, aligned=True)
        expected = [iou for *_, iou in shifts] + [1 / 2, 1, 0]
        np.testing.assert_allclose(ious, expected, atol=1e-7)


def test_rotated_nms_is_applied_per_label():
    boxes = torch.tensor([[0, 0, 4, 4, 0.1], [0, 0, 4, 4, 0.2], [0, 0, 4, 4, 0.3]])
    scores, labels = torch.tensor([0.3, 0.9, 0.6]), torch.tensor([0, 1, 0])
    dets = torch.cat((boxes, labels[:, None]), 1)  # the form in which mmcv.ops.nms_rotated passes them
    order = scores.argsort(descending=True)
    assert ext.nms_rotated(dets, scores, order, dets[order], labels, 0.5, True).tolist() == [1, 2]
    assert ext.nms_rotated(boxes, scores, order, boxes[order], labels, 0.5, False).tolist() == [1]
