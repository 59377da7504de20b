"""ScalableViT as a paper's reader would write it first: one module after the other, every score in memory.

It has the parameters of :class:`mmvitzoo.models.ScalableViT` under the same names. Windows at the
border are clipped by cutting the map into the four regions in which all windows are of one size.
"""

import torch
import torch.nn.functional as F
from torch import nn


def attention(q, k, v, heads, scale):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(2)


class PlainWindowAttention(nn.Module):
    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.interact = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def windows(self, qkv, height, width):
        """Of one region, in which all windows are of the same size."""
        batch, rows, cols, channels = qkv.shape
        x = qkv.reshape(batch, rows // height, height, cols // width, width, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height * width, channels)
        x = attention(*x.chunk(3, -1), self.heads, self.scale)
        x = x.reshape(batch, rows // height, cols // width, height, width, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows, cols, -1)

    def forward(self, x):
        qkv = self.qkv(x)
        value = qkv.chunk(3, -1)[2].permute(0, 3, 1, 2)
        local = self.interact(value).permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        bottom, right = height - height % self.window, width - width % self.window
        bands = []
        for top, end, tall in ((0, bottom, self.window), (bottom, height, height - bottom)):
            regions = []
            for left, stop, wide in ((0, right, self.window), (right, width, width - right)):
                if end > top and stop > left:
                    regions.append(self.windows(qkv[:, top:end, left:stop], tall, wide))
            if regions:
                bands.append(torch.cat(regions, 2))
        return self.proj(torch.cat(bands, 1) + local)


class PlainScalableAttention(nn.Module):
    def __init__(self, dim, heads, ratio, width, scale):
        super().__init__()
        self.heads, self.ratio, self.scale = heads, ratio, scale
        self.q = nn.Linear(dim, width)
        if ratio > 1:
            self.reduction = nn.Sequential(nn.Conv2d(dim, dim, ratio, ratio, groups=dim), nn.Conv2d(dim, width, 1))
            self.norm = nn.LayerNorm(width, eps=1e-5)
            self.k = nn.Linear(width, width)
            self.v = nn.Linear(width, dim)
        else:
            self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, height, width, _ = x.shape
        q = self.q(x).flatten(1, 2)
        if self.ratio > 1:
            y = F.pad(x, (0, 0, 0, -width % self.ratio, 0, -height % self.ratio)).permute(0, 3, 1, 2)
            y = F.gelu(self.norm(self.reduction(y).flatten(2).transpose(1, 2)))
            k, v = self.k(y), self.v(y)
        else:
            k, v = self.kv(x.flatten(1, 2)).chunk(2, -1)
        return self.proj(attention(q, k, v, self.heads, self.scale)).view(batch, height, width, -1)


class PlainBlock(nn.Module):
    def __init__(self, dim, attn):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x))))


class PlainScalableViT(nn.Module):
    """The plain network of the same form and weights as a given :class:`mmvitzoo.models.ScalableViT`."""

    def __init__(self, model):
        super().__init__()
        self.out_indices = model.out_indices
        self.embeds, self.stages, self.positions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, (embed, blocks) in enumerate(zip(model.embeds, model.stages)):
            conv = embed.projection
            dim = conv.out_channels
            projection = nn.Conv2d(conv.in_channels, dim, conv.kernel_size, conv.stride, conv.padding)
            self.embeds.append(nn.ModuleDict(dict(projection=projection, norm=nn.LayerNorm(dim, eps=1e-6))))
            self.stages.append(nn.ModuleList())
            for i, block in enumerate(blocks):
                attn = block.attn
                if i % 2:
                    plain = PlainScalableAttention(
                        dim, attn.num_heads, attn.spatial_ratio, attn.q.out_features, attn.scale
                    )
                else:
                    plain = PlainWindowAttention(dim, attn.num_heads, attn.window_size)
                self.stages[stage].append(PlainBlock(dim, plain))
            self.positions.append(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))
            if stage in self.out_indices:
                setattr(self, f'norm{stage}', nn.LayerNorm(dim, eps=1e-6))
        self.load_state_dict(model.state_dict())

    def forward(self, x):
        outs = []
        for stage, blocks in enumerate(self.stages):
            embed = self.embeds[stage]
            x = embed['norm'](embed['projection'](x).permute(0, 2, 3, 1))
            for i, block in enumerate(blocks):
                x = block(x)
                if i == 0:
                    x = x + self.positions[stage](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            if stage in self.out_indices:
                outs.append(getattr(self, f'norm{stage}')(x).permute(0, 3, 1, 2).contiguous())
            x = x.permute(0, 3, 1, 2)
        return tuple(outs)
