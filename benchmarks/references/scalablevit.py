"""Reference implementation of ScalableViT with every attention score in memory.

Parameters have the names of :class:`mmvitzoo.models.ScalableViT`. Instead of a mask for clipped windows, the map is cut
into four regions, in each of which all windows have the same size.
"""

import torch
import torch.nn.functional as F
from torch import nn


def attention(q, k, v, num_heads, scale):
    """Multi-head attention of (B, N, C) tokens."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(2)


class ReferenceWindowAttention(nn.Module):
    """Interactive windowed self-attention."""

    def __init__(self, dim, num_heads, window_size):
        super().__init__()
        self.num_heads, self.window_size, self.scale = num_heads, window_size, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.local_interaction = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def region_attention(self, qkv, window_height, window_width):
        """Attention in windows of one size, which divides the region: (B, H, W, 3 * C) -> (B, H, W, C)."""
        batch, height, width, channels = qkv.shape
        rows, cols = height // window_height, width // window_width
        x = qkv.reshape(batch, rows, window_height, cols, window_width, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window_height * window_width, channels)
        x = attention(*x.chunk(3, -1), self.num_heads, self.scale)
        x = x.reshape(batch, rows, cols, window_height, window_width, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)."""
        qkv = self.qkv(x)
        v = qkv.chunk(3, -1)[2].permute(0, 3, 1, 2)
        local = self.local_interaction(v).permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        side = self.window_size
        bottom, right = height - height % side, width - width % side  # where whole windows end
        bands = []
        for top, end, window_height in ((0, bottom, side), (bottom, height, height - bottom)):
            regions = []
            for left, stop, window_width in ((0, right, side), (right, width, width - right)):
                if end > top and stop > left:
                    regions.append(self.region_attention(qkv[:, top:end, left:stop], window_height, window_width))
            if regions:
                bands.append(torch.cat(regions, 2))
        return self.proj(torch.cat(bands, 1) + local)


class ReferenceScalableAttention(nn.Module):
    """Scalable self-attention; ``width`` are the channels of queries and keys."""

    def __init__(self, dim, num_heads, spatial_ratio, width, scale):
        super().__init__()
        self.num_heads, self.spatial_ratio, self.scale = num_heads, spatial_ratio, scale
        self.q = nn.Linear(dim, width)
        if spatial_ratio > 1:
            self.reduction = nn.Sequential(
                nn.Conv2d(dim, dim, spatial_ratio, spatial_ratio, groups=dim), nn.Conv2d(dim, width, 1)
            )
            self.norm = nn.LayerNorm(width, eps=1e-5)
            self.k = nn.Linear(width, width)
            self.v = nn.Linear(width, dim)
        else:
            self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)."""
        batch, height, width, _ = x.shape
        q = self.q(x).flatten(1, 2)
        if self.spatial_ratio > 1:
            padding = (0, 0, 0, -width % self.spatial_ratio, 0, -height % self.spatial_ratio)
            y = F.pad(x, padding).permute(0, 3, 1, 2)
            y = F.gelu(self.norm(self.reduction(y).flatten(2).transpose(1, 2)))
            k, v = self.k(y), self.v(y)
        else:
            k, v = self.kv(x.flatten(1, 2)).chunk(2, -1)
        return self.proj(attention(q, k, v, self.num_heads, self.scale)).view(batch, height, width, -1)


class ReferenceBlock(nn.Module):
    """Transformer block."""

    def __init__(self, dim, attn):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x))))


class ReferenceScalableViT(nn.Module):
    """Reference network with the form and the weights of a given :class:`mmvitzoo.models.ScalableViT`."""

    def __init__(self, model):
        super().__init__()
        self.out_indices = model.out_indices
        self.patch_embeds, self.stages, self.pos_embeds = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, (patch_embed, blocks) in enumerate(zip(model.patch_embeds, model.stages)):
            conv = patch_embed.proj
            dim = conv.out_channels
            proj = nn.Conv2d(conv.in_channels, dim, conv.kernel_size, conv.stride, conv.padding)
            self.patch_embeds.append(nn.ModuleDict(dict(proj=proj, norm=nn.LayerNorm(dim, eps=1e-6))))
            self.stages.append(nn.ModuleList())
            for i, block in enumerate(blocks):
                attn = block.attn
                if i % 2:
                    reference = ReferenceScalableAttention(
                        dim, attn.num_heads, attn.spatial_ratio, attn.q.out_features, attn.scale
                    )
                else:
                    reference = ReferenceWindowAttention(dim, attn.num_heads, attn.window_size)
                self.stages[stage].append(ReferenceBlock(dim, reference))
            self.pos_embeds.append(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))
            if stage in self.out_indices:
                setattr(self, f'norm{stage}', nn.LayerNorm(dim, eps=1e-6))
        self.load_state_dict(model.state_dict())

    def forward(self, x):
        """(B, 3, H, W) -> normalized maps of the stages in ``out_indices``."""
        outs = []
        for stage, blocks in enumerate(self.stages):
            patch_embed = self.patch_embeds[stage]
            x = patch_embed['norm'](patch_embed['proj'](x).permute(0, 2, 3, 1))
            for i, block in enumerate(blocks):
                x = block(x)
                if i == 0:
                    x = x + self.pos_embeds[stage](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            if stage in self.out_indices:
                outs.append(getattr(self, f'norm{stage}')(x).permute(0, 3, 1, 2).contiguous())
            x = x.permute(0, 3, 1, 2)
        return tuple(outs)
