"""Attention with relative positions against its plain formula, windows, positions, linears."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmvitzoo.models.layers import (
    Attention,
    Linear,
    Mlp,
    PatchEmbedding,
    attend,
    attend_plain,
    attention,
    merge_windows,
    partition_windows,
    split_linear,
    window_mask,
)
from mmvitzoo.models.layers.attention import attend_biased, attend_extended, relative_table


def plain_attention(q, k, v, table_h, table_w):
    """Every score by itself."""
    (queries_h, keys_h), (queries_w, keys_w) = table_h.shape[:2], table_w.shape[:2]
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    for i in range(queries_h * queries_w):
        for j in range(keys_h * keys_w):
            offset = table_h[i // queries_w, j // keys_w] + table_w[i % queries_w, j % keys_w]
            scores[:, :, i, j] += q[:, :, i] @ offset
    return scores.softmax(-1) @ v


def inputs(batch=2, heads=2, queries=(3, 5), keys=(4, 3), channels=8, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries[0] * queries[1], channels, dtype=dtype)
    k, v = torch.randn(2, batch, heads, keys[0] * keys[1], channels, dtype=dtype)
    table_h = torch.randn(queries[0], keys[0], channels, dtype=dtype)
    table_w = torch.randn(queries[1], keys[1], channels, dtype=dtype)
    return q, k, v, table_h, table_w


@pytest.mark.parametrize('function', [attend_extended, attend_biased])
def test_relative_attention_equals_formula(function):
    tensors = inputs()
    torch.testing.assert_close(function(*tensors), plain_attention(*tensors), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('elements', [1, 12, 12 * 5 * 2, 12 * 15, 12 * 15 * 2])
def test_bias_in_parts_of_any_size(elements, monkeypatch):
    """One row of queries at a time, some, all of an image, all of two images."""
    tensors = inputs(batch=3)
    monkeypatch.setattr(attention, 'BIAS_ELEMENTS', elements)
    torch.testing.assert_close(attend_biased(*tensors), plain_attention(*tensors), atol=1e-12, rtol=1e-12)


def test_gradients_of_the_extension():
    """Of q, k, v and both tables, by finite differences and against the plain formula, in float64."""
    tensors = [x.requires_grad_() for x in inputs(batch=1, queries=(2, 3), keys=(2, 2), channels=4)]
    assert torch.autograd.gradcheck(attend_extended, tensors)
    weights = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    ours = torch.autograd.grad((attend(*tensors) * weights).sum(), tensors)
    plain = torch.autograd.grad((plain_attention(*tensors) * weights).sum(), tensors)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_both_forms_agree_in_float32():
    tensors = inputs(batch=1, queries=(16, 20), keys=(16, 20), channels=32, dtype=torch.float32)
    torch.testing.assert_close(attend_extended(*tensors), attend_biased(*tensors), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('training', [False, True])
def test_fused_kernels_take_both_forms(training):
    """The kernel raises if the inputs are not for it; the fallback would build the score matrix."""
    layer = Attention(64, 2, rel_pos_size=(8, 6))
    x = torch.randn(1, 8, 6, 64, requires_grad=training)
    with torch.set_grad_enabled(training), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = layer(x)
        if training:
            y.sum().backward()


def test_relative_table_places_and_interpolates():
    table = torch.arange(7.0)[:, None]
    places = relative_table(table, 4, 4)[..., 0]
    assert places.tolist() == [[3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2], [6, 5, 4, 3]]
    stretched = relative_table(table, 6, 6)[..., 0]
    expected = F.interpolate(table.T[None], 11, mode='linear')[0, 0]
    assert torch.equal(stretched[0], expected[:6].flip(0)) and torch.equal(stretched[:, 0], expected[5:])
    # Two keys among four queries lie at 0 and 2, two queries among four keys as well.
    assert relative_table(table, 4, 2)[..., 0].tolist() == [[2, 0], [3, 1], [4, 2], [5, 3]]
    assert relative_table(table, 2, 4)[..., 0].tolist() == [[3, 2, 1, 0], [5, 4, 3, 2]]
    # Of three among four, at 4 / 3 of a step, places are cut off.
    assert relative_table(table, 4, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2], [5, 4, 3]]


@pytest.mark.parametrize('scaled', [False, True])
def test_conventions_of_relative_positions(scaled):
    """The tables meet the query after its scaling, or before."""
    torch.manual_seed(0)
    layer = Attention(16, 2, rel_pos_size=(3, 4), rel_pos_scaled=scaled).double().eval()
    torch.nn.init.normal_(layer.rel_pos_h)
    torch.nn.init.normal_(layer.rel_pos_w)
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).reshape(2, 12, 3, 2, 8).permute(2, 0, 3, 1, 4)
    factor = 8**-0.5 if scaled else 1
    tables = factor * relative_table(layer.rel_pos_h, 3, 3), factor * relative_table(layer.rel_pos_w, 4, 4)
    expected = layer.proj(plain_attention(q, k, v, *tables).transpose(1, 2).reshape(2, 3, 4, 16))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('size', [(8, 12), (7, 13), (3, 2)])
def test_windows_attend_with_their_padding(size):
    """Each window by itself; padded tokens are zeros before the projection and attend, too."""
    torch.manual_seed(0)
    layer = Attention(16, 2, window_size=4, rel_pos_size=(4, 4)).eval()
    whole = Attention(16, 2, rel_pos_size=(4, 4)).eval()
    torch.nn.init.normal_(layer.rel_pos_h)
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(2, *size, 16)
    height, width = (-(-side // 4) * 4 for side in size)
    padded = x.new_zeros(2, height, width, 16)
    padded[:, : size[0], : size[1]] = x
    expected = torch.empty_like(padded)
    for top in range(0, height, 4):
        for left in range(0, width, 4):
            window = (slice(None), slice(top, top + 4), slice(left, left + 4))
            expected[window] = whole(padded[window])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[:, : size[0], : size[1]], atol=1e-6, rtol=1e-5)


def test_windows_are_cut_in_reading_order():
    x = torch.arange(24.0).view(1, 4, 6, 1)
    windows = partition_windows(x, 2)
    assert windows.shape == (6, 2, 2, 1)
    assert windows[1].flatten().tolist() == [2, 3, 8, 9] and windows[3].flatten().tolist() == [12, 13, 18, 19]
    assert torch.equal(merge_windows(windows, (4, 6)), x)
    odd = torch.randn(2, 5, 7, 3)
    assert torch.equal(merge_windows(partition_windows(odd, 3), (5, 7)), odd)


def test_tables_of_another_size_are_resized_when_loaded():
    small, large = Attention(16, 2, rel_pos_size=(3, 4)), Attention(16, 2, rel_pos_size=(6, 4))
    torch.nn.init.normal_(small.rel_pos_h)
    large.load_state_dict(small.state_dict())
    expected = F.interpolate(small.rel_pos_h.detach().T[None], 11, mode='linear')[0].T
    assert torch.equal(large.rel_pos_h.detach(), expected)


def test_positions_of_another_grid_are_resized_when_loaded():
    torch.manual_seed(0)
    small, large = PatchEmbedding(8, 4, (3, 3), True), PatchEmbedding(8, 4, (4, 6), True)
    bare = PatchEmbedding(8, 4, (3, 3), False)
    state = small.state_dict()
    large.load_state_dict(state)
    grid = state['pos_embed'][:, 1:].view(1, 3, 3, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (4, 6), mode='bicubic').flatten(2).transpose(1, 2)
    assert torch.equal(large.pos_embed[:, 1:], expected) and torch.equal(large.pos_embed[:, :1], small.pos_embed[:, :1])
    # The class token goes, with its position.
    bare.load_state_dict(state)
    assert torch.equal(bare.pos_embed, small.pos_embed[:, 1:])
    with pytest.raises(RuntimeError, match='size mismatch for pos_embed'):
        large.load_state_dict(dict(state, pos_embed=torch.zeros(1, 8, 8)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('bias', [True, False])
def test_linear_without_gradient_equals_linear_with(dtype, bias):
    torch.manual_seed(0)
    layer = Linear(16, 24, bias=bias).to(dtype)
    for shape in ((5, 16), (2, 3, 4, 16)):
        x = torch.randn(shape, dtype=dtype)
        expected = F.linear(x, layer.weight, layer.bias)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
        assert layer(x).requires_grad
        layer.weight.requires_grad_(False)
        assert layer(x).requires_grad == bias
        layer.weight.requires_grad_(True)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 or dtype == torch.float64


def test_adapters_are_called():
    """What stands in for a linear, such as LoRA's, keeps its place before the GELU and before the parts."""

    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 1

    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    mlp = Mlp(8, 16)
    with torch.no_grad():
        hidden = F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(hidden)))
        mlp.fc1 = Adapter(mlp.fc1)
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(hidden + 1)))
        layer = Linear(8, 12)
        parts = split_linear(layer, x, 3)
        for part, expected in zip(parts, layer(x).chunk(3, -1)):
            torch.testing.assert_close(part, expected)
            assert part.is_contiguous()
        for part, changed in zip(parts, split_linear(Adapter(layer), x, 3)):
            torch.testing.assert_close(changed, part + 1)


def test_plain_attention_of_any_width_and_mask():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 2, 5, 6, dtype=torch.float64)
    for width in (4, 6, 9):
        v = torch.randn(2, 2, 5, width, dtype=torch.float64)
        mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)[:, None, None]
        scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(attend_plain(q, k, v, mask, scale=0.3), scores @ v)
        torch.testing.assert_close(attend_plain(q, k, v), (q @ k.transpose(-1, -2) * 6**-0.5).softmax(-1) @ v)


def test_window_mask_is_true_on_the_map():
    assert window_mask((14, 7), 7, 2, 'cpu') is None
    mask = window_mask((3, 5), 4, 2, 'cpu')
    assert mask.shape == (4, 1, 1, 16)
    left, right = mask[:2, 0, 0].view(2, 4, 4)
    assert left.sum() == 12 and left[:3].all() and right.sum() == 3 and right[:3, 0].all()
    assert torch.equal(mask[:2], mask[2:])
