"""MViTv2 as a paper's reader would write it first: one module after the other, every score in memory.

It has the parameters of :class:`mmvitzoo.models.MViTv2` under the same names and the arithmetic of
the usual public implementations: heads apart from the start, a table of relative positions and a
score matrix per head, windows cut from copied maps, torch's own linears.
"""

import torch
import torch.nn.functional as F
from torch import nn


class PlainAttention(nn.Module):
    def __init__(self, dim, out_dim, heads, stride_q, stride_kv, window, table_sizes):
        super().__init__()
        self.heads, self.window, self.head_dim = heads, window, out_dim // heads
        self.qkv = nn.Linear(dim, 3 * out_dim)
        for name, stride in (('q', stride_q), ('k', stride_kv), ('v', stride_kv)):
            conv = nn.Conv2d(self.head_dim, self.head_dim, 3, stride, 1, groups=self.head_dim, bias=False)
            setattr(self, f'pool_{name}', conv)
            setattr(self, f'norm_{name}', nn.LayerNorm(self.head_dim, eps=1e-6))
        self.rel_pos_h = nn.Parameter(torch.zeros(table_sizes[0], self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(table_sizes[1], self.head_dim))
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x):
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height, width, 3, self.heads, self.head_dim).permute(3, 0, 4, 5, 1, 2)
        maps = []
        for name, y in zip('qkv', qkv.flatten(1, 2)):
            y = getattr(self, f'pool_{name}')(y)  # (B * heads, C, H, W)
            maps.append(getattr(self, f'norm_{name}')(y.permute(0, 2, 3, 1)))
        q, k, v = maps
        size = q.shape[1:3]
        if self.window:
            sides = [self.window // getattr(self, f'pool_{name}').stride[0] for name in 'qkv']
            q, k, v = (cut(y, side) for y, side in zip((q, k, v), sides))
        scores = (q.flatten(1, 2) * self.head_dim**-0.5) @ k.flatten(1, 2).transpose(1, 2)
        rows = torch.einsum('bhwc,hkc->bhwk', q, table(self.rel_pos_h, q.shape[1], k.shape[1]))
        cols = torch.einsum('bhwc,wkc->bhwk', q, table(self.rel_pos_w, q.shape[2], k.shape[2]))
        scores = scores.view(*q.shape[:3], *k.shape[1:3]) + rows[..., None] + cols[..., None, :]
        x = scores.flatten(3).flatten(1, 2).softmax(-1) @ v.flatten(1, 2)
        x = x.view(q.shape) + q
        if self.window:
            x = join(x, size)
        return self.proj(x.unflatten(0, (batch, self.heads)).permute(0, 2, 3, 1, 4).flatten(3))


def table(parameter, queries, keys):
    length = 2 * max(queries, keys) - 1
    if len(parameter) != length:
        parameter = F.interpolate(parameter.T[None], length, mode='linear')[0].T
    i = torch.arange(queries)[:, None] * max(keys / queries, 1.0)
    j = torch.arange(keys)[None] * max(queries / keys, 1.0)
    return parameter[(i - j + (keys - 1) * max(queries / keys, 1.0)).long()]


def cut(x, side):
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    batch, height, width, channels = x.shape
    x = x.view(batch, height // side, side, width // side, side, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, channels)


def join(windows, size):
    side, channels = windows.shape[1], windows.shape[-1]
    rows, cols = -(-size[0] // side), -(-size[1] // side)
    x = windows.view(-1, rows, cols, side, side, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * side, cols * side, channels)[:, : size[0], : size[1]].contiguous()


class PlainMlp(nn.Module):
    def __init__(self, dim, hidden_dim, out_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class PlainBlock(nn.Module):
    def __init__(self, dim, attn_dim, out_dim, stride, **attention):
        super().__init__()
        self.stride, self.dims = stride, (dim, attn_dim, out_dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PlainAttention(dim, attn_dim, stride_q=stride, **attention)
        self.norm2 = nn.LayerNorm(attn_dim, eps=1e-6)
        self.mlp = PlainMlp(attn_dim, 4 * attn_dim, out_dim)
        if dim != out_dim:
            self.skip = nn.Linear(dim, out_dim)

    def forward(self, x):
        dim, attn_dim, out_dim = self.dims
        y = self.norm1(x)
        skip = self.skip(y) if dim != attn_dim else x
        if self.stride > 1:
            skip = F.max_pool2d(skip.permute(0, 3, 1, 2), 3, self.stride, 1).permute(0, 2, 3, 1)
        x = skip + self.attn(y)
        y = self.norm2(x)
        return (self.skip(y) if attn_dim != out_dim else x) + self.mlp(y)


class PlainMViTv2(nn.Module):
    """The plain network of the same form and weights as a given :class:`mmvitzoo.models.MViTv2`."""

    def __init__(self, model):
        super().__init__()
        self.ends = {model.starts[stage + 1] - 1: stage for stage in model.out_indices}
        self.stem = nn.Conv2d(3, model.stem.out_channels, 7, 4, 3)
        self.blocks = nn.ModuleList()
        for block in model.blocks:
            attn = block.attn
            plain = PlainBlock(
                block.norm1.normalized_shape[0],
                block.norm2.normalized_shape[0],
                block.mlp.fc2.out_features,
                block.stride,
                heads=attn.num_heads,
                stride_kv=attn.pool_k.stride[0],
                window=attn.window_size,
                table_sizes=(len(attn.rel_pos_h), len(attn.rel_pos_w)),
            )
            self.blocks.append(plain)
        for stage in self.ends.values():
            setattr(self, f'norm{stage}', nn.LayerNorm(getattr(model, f'norm{stage}').normalized_shape, eps=1e-6))
        self.load_state_dict(model.state_dict())

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                outs.append(getattr(self, f'norm{self.ends[i]}')(x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)
