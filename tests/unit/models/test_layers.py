"""Attention with relative positions against its plain formula, windows, and absolute positions."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmvitzoo.models import PlainViT
from mmvitzoo.models.layers import (
    Attention,
    cpu,
    pad_to_multiple,
    rel_pos_attention_flash,
    sdpa,
    window_mask,
    window_partition,
    window_unpartition,
)
from mmvitzoo.models.layers.cpu import rel_pos_attention_biased
from mmvitzoo.models.layers.rel_pos import get_rel_pos


def naive_attention(q, k, v, rel_h, rel_w):
    """Computes every score by itself."""
    (q_height, k_height), (q_width, k_width) = rel_h.shape[:2], rel_w.shape[:2]
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    for i in range(q_height * q_width):
        for j in range(k_height * k_width):
            offset = rel_h[i // q_width, j // k_width] + rel_w[i % q_width, j % k_width]
            scores[:, :, i, j] += q[:, :, i] @ offset
    return scores.softmax(-1) @ v


def random_inputs(batch=2, heads=2, q_size=(3, 5), k_size=(4, 3), channels=8, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, q_size[0] * q_size[1], channels, dtype=dtype)
    k, v = torch.randn(2, batch, heads, k_size[0] * k_size[1], channels, dtype=dtype)
    rel_h = torch.randn(q_size[0], k_size[0], channels, dtype=dtype)
    rel_w = torch.randn(q_size[1], k_size[1], channels, dtype=dtype)
    return q, k, v, rel_h, rel_w


@pytest.mark.parametrize('function', [rel_pos_attention_flash, rel_pos_attention_biased])
def test_rel_pos_attention_equals_formula(function):
    inputs = random_inputs()
    torch.testing.assert_close(function(*inputs), naive_attention(*inputs), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('elements', [1, 12, 12 * 5 * 2, 12 * 15, 12 * 15 * 2])
def test_biased_attention_in_chunks_of_any_size(elements, monkeypatch):
    """Chunks of one row of queries, some rows, one image, two images."""
    inputs = random_inputs(batch=3)
    monkeypatch.setattr(cpu, 'BIAS_ELEMENTS', elements)
    torch.testing.assert_close(rel_pos_attention_biased(*inputs), naive_attention(*inputs), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('function', [rel_pos_attention_flash, rel_pos_attention_biased])
def test_gradients_of_rel_pos_attention(function):
    """Gradients of q, k, v and both tables equal finite differences and those of the plain formula, in float64."""
    inputs = [x.requires_grad_() for x in random_inputs(batch=1, q_size=(2, 3), k_size=(2, 2), channels=4)]
    assert torch.autograd.gradcheck(function, inputs)
    weights = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    grads = torch.autograd.grad((function(*inputs) * weights).sum(), inputs)
    expected = torch.autograd.grad((naive_attention(*inputs) * weights).sum(), inputs)
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_flash_and_biased_agree_in_float32():
    inputs = random_inputs(batch=1, q_size=(16, 20), k_size=(16, 20), channels=32, dtype=torch.float32)
    torch.testing.assert_close(
        rel_pos_attention_flash(*inputs), rel_pos_attention_biased(*inputs), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('function', [rel_pos_attention_flash, rel_pos_attention_biased])
def test_flash_kernel_takes_rel_pos_attention(function, training):
    """The context raises if the kernel does not take the inputs; the fallback would build the score matrix."""
    layer = Attention(64, 2, input_size=(8, 6))
    layer.rel_pos_kernel = function
    x = torch.randn(1, 8, 6, 64, requires_grad=training)
    with torch.set_grad_enabled(training), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = layer(x)
        if training:
            y.sum().backward()


def test_get_rel_pos_indexes_and_interpolates():
    table = torch.arange(7.0)[:, None]
    indices = get_rel_pos(4, 4, table)[..., 0]
    assert indices.tolist() == [[3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2], [6, 5, 4, 3]]
    resized = get_rel_pos(6, 6, table)[..., 0]
    expected = F.interpolate(table.T[None], 11, mode='linear')[0, 0]
    assert torch.equal(resized[0], expected[:6].flip(0)) and torch.equal(resized[:, 0], expected[5:])
    # Two keys among four queries are at 0 and 2, and two queries among four keys as well.
    assert get_rel_pos(4, 2, table)[..., 0].tolist() == [[2, 0], [3, 1], [4, 2], [5, 3]]
    assert get_rel_pos(2, 4, table)[..., 0].tolist() == [[3, 2, 1, 0], [5, 4, 3, 2]]
    # Three keys among four queries have a step of 4 / 3, and indices are truncated.
    assert get_rel_pos(4, 3, table)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2], [5, 4, 3]]


@pytest.mark.parametrize('scaled', [False, True])
def test_rel_pos_scaled_multiplies_the_scaled_query(scaled):
    torch.manual_seed(0)
    layer = Attention(16, 2, input_size=(3, 4), rel_pos_scaled=scaled).double().eval()
    torch.nn.init.normal_(layer.rel_pos_h)
    torch.nn.init.normal_(layer.rel_pos_w)
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).reshape(2, 12, 3, 2, 8).permute(2, 0, 3, 1, 4)
    factor = 8**-0.5 if scaled else 1
    rel_pos = factor * get_rel_pos(3, 3, layer.rel_pos_h), factor * get_rel_pos(4, 4, layer.rel_pos_w)
    expected = layer.proj(naive_attention(q, k, v, *rel_pos).transpose(1, 2).reshape(2, 3, 4, 16))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('size', [(8, 12), (7, 13), (3, 2)])
def test_padding_of_windows_takes_part_in_attention(size):
    """Padded tokens are zeros before the projection to queries, keys and values."""
    torch.manual_seed(0)
    layer = Attention(16, 2, window_size=4, input_size=(4, 4)).eval()
    global_layer = Attention(16, 2, input_size=(4, 4)).eval()
    torch.nn.init.normal_(layer.rel_pos_h)
    global_layer.load_state_dict(layer.state_dict())
    x = torch.randn(2, *size, 16)
    height, width = (-(-side // 4) * 4 for side in size)
    padded = x.new_zeros(2, height, width, 16)
    padded[:, : size[0], : size[1]] = x
    expected = torch.empty_like(padded)
    for top in range(0, height, 4):
        for left in range(0, width, 4):
            window = (slice(None), slice(top, top + 4), slice(left, left + 4))
            expected[window] = global_layer(padded[window])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[:, : size[0], : size[1]], atol=1e-6, rtol=1e-5)


def test_window_partition_is_in_row_major_order():
    x = torch.arange(24.0).view(1, 4, 6, 1)
    windows = window_partition(x, 2)
    assert windows.shape == (6, 2, 2, 1)
    assert windows[1].flatten().tolist() == [2, 3, 8, 9] and windows[3].flatten().tolist() == [12, 13, 18, 19]
    assert torch.equal(window_unpartition(windows, (4, 6)), x)
    padded = torch.randn(2, 5, 7, 3)
    assert torch.equal(window_unpartition(window_partition(padded, 3), (5, 7)), padded)


def test_window_mask_is_true_on_the_map():
    assert window_mask((14, 7), 7, 2, 'cpu') is None
    mask = window_mask((3, 5), 4, 2, 'cpu')
    assert mask.shape == (4, 1, 1, 16)
    left, right = mask[:2, 0, 0].view(2, 4, 4)
    assert left.sum() == 12 and left[:3].all() and right.sum() == 3 and right[:3, 0].all()
    assert torch.equal(mask[:2], mask[2:])


def test_pad_to_multiple_in_both_layouts():
    x = torch.randn(2, 5, 8, 3)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (2, 8, 8, 3) and torch.equal(padded[:, :5], x) and not padded[:, 5:].any()
    assert torch.equal(pad_to_multiple(x.permute(0, 3, 1, 2), 4, channels_first=True), padded.permute(0, 3, 1, 2))
    assert pad_to_multiple(padded, 4) is padded


def test_rel_pos_of_another_size_is_resized_on_loading():
    small, large = Attention(16, 2, input_size=(3, 4)), Attention(16, 2, input_size=(6, 4))
    torch.nn.init.normal_(small.rel_pos_h)
    large.load_state_dict(small.state_dict())
    expected = F.interpolate(small.rel_pos_h.detach().T[None], 11, mode='linear')[0].T
    assert torch.equal(large.rel_pos_h.detach(), expected)


def test_pos_embed_of_another_grid_is_resized_on_loading():
    torch.manual_seed(0)
    arch = dict(embed_dims=8, num_layers=1, num_heads=1, mlp_ratio=1)
    small = PlainViT(arch, img_size=48)
    large = PlainViT(arch, img_size=(64, 96))
    without_cls_token = PlainViT(arch, img_size=48, with_cls_token=False)
    state_dict = small.state_dict()
    large.load_state_dict(state_dict)
    grid = state_dict['pos_embed'][:, 1:].view(1, 3, 3, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (4, 6), mode='bicubic').flatten(2).transpose(1, 2)
    torch.testing.assert_close(large.pos_embed[:, 1:].detach(), expected, rtol=0, atol=1e-7)
    assert torch.equal(large.pos_embed[:, :1], small.pos_embed[:, :1])
    # The class token is dropped with its position.
    without_cls_token.load_state_dict(state_dict)
    assert torch.equal(without_cls_token.pos_embed, small.pos_embed[:, 1:])
    with pytest.raises(RuntimeError, match='size mismatch for pos_embed'):
        large.load_state_dict(dict(state_dict, pos_embed=torch.zeros(1, 8, 8)))


def test_sdpa_of_any_value_width_and_mask():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 2, 5, 6, dtype=torch.float64)
    for width in (4, 6, 9):
        v = torch.randn(2, 2, 5, width, dtype=torch.float64)
        mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)[:, None, None]
        weights = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(sdpa(q, k, v, mask, scale=0.3), weights @ v)
        torch.testing.assert_close(sdpa(q, k, v), (q @ k.transpose(-1, -2) * 6**-0.5).softmax(-1) @ v)
