"""Reference implementation of MPViT without optimizations.

Parameters have the names of :class:`mmvitzoo.models.MPViT`. Transformers read (B, N, C) tokens, convolutions
(B, C, H, W) maps, with a copy in between.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ReferenceConv(nn.Module):
    """Convolution, BatchNorm and Hardswish; the last two as in the given ``ConvModule``."""

    def __init__(self, module):
        super().__init__()
        conv = module.conv
        self.conv = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            groups=conv.groups,
            bias=False,
        )
        if module.with_norm:
            self.bn = nn.BatchNorm2d(conv.out_channels)
        self.with_norm, self.with_activation = module.with_norm, module.with_activation

    def forward(self, x):
        x = self.conv(x)
        if self.with_norm:
            x = self.bn(x)
        return F.hardswish(x) if self.with_activation else x


class ReferenceBlock(nn.Module):
    """Transformer block; the encoder owns the position encodings ``cpe`` and ``crpe``."""

    def __init__(self, dim, hidden_dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden_dim), fc2=nn.Linear(hidden_dim, dim)))

    def forward(self, x, size, cpe, crpe):
        """(B, H * W, C) -> (B, H * W, C) for ``size`` (H, W)."""
        batch, tokens, dim = x.shape
        feature_map = x.transpose(1, 2).reshape(batch, dim, *size)
        x = (cpe(feature_map) + feature_map).flatten(2).transpose(1, 2)
        qkv = self.attn['qkv'](self.norm1(x)).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim)
        context = k.softmax(2).transpose(2, 3) @ v
        y = self.scale * (q @ context) + q * self.relative_positions(v, size, crpe)
        x = x + self.attn['proj'](y.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x))))

    def relative_positions(self, v, size, crpe):
        """(B, heads, H * W, head_dim) -> (B, heads, H * W, head_dim)."""
        feature_map = v.transpose(2, 3).reshape(len(v), -1, *size)
        chunks = feature_map.split([conv.in_channels for conv in crpe.convs], 1)
        feature_map = torch.cat([conv(chunk) for conv, chunk in zip(crpe.convs, chunks)], 1)
        return feature_map.reshape(len(v), self.num_heads, -1, size[0] * size[1]).transpose(2, 3)


class ReferenceEncoder(nn.Module):
    """Path of transformer blocks."""

    def __init__(self, encoder, num_heads):
        super().__init__()
        dim = encoder.cpe.in_channels
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.crpe = nn.Module()
        self.crpe.convs = nn.ModuleList(
            nn.Conv2d(conv.in_channels, conv.in_channels, conv.kernel_size, padding=conv.padding, groups=conv.groups)
            for conv in encoder.crpe.convs
        )
        hidden_dims = [block.mlp.fc1.out_features for block in encoder.blocks]
        self.blocks = nn.ModuleList(ReferenceBlock(dim, hidden_dim, num_heads) for hidden_dim in hidden_dims)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, x.shape[2:], self.cpe, self.crpe)
        return tokens.transpose(1, 2).reshape(x.shape)


class ReferenceStage(nn.Module):
    """Patch embeddings, local branch, paths and aggregation."""

    def __init__(self, stage, num_heads):
        super().__init__()
        self.patch_embeds = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    depthwise_conv=ReferenceConv(patch_embed.depthwise_conv),
                    pointwise_conv=ReferenceConv(patch_embed.pointwise_conv),
                )
            )
            for patch_embed in stage.patch_embeds
        )
        self.local = nn.Sequential(*(ReferenceConv(layer) for layer in stage.local))
        self.paths = nn.ModuleList(ReferenceEncoder(encoder, num_heads) for encoder in stage.paths)
        self.aggregate = ReferenceConv(stage.aggregate)

    def forward(self, x):
        """(B, C, H, W) -> (B, C', H', W')."""
        embedded = []
        for patch_embed in self.patch_embeds:
            x = patch_embed['pointwise_conv'](patch_embed['depthwise_conv'](x))
            embedded.append(x)
        outs = [embedded[0] + self.local(embedded[0]), *(path(y) for path, y in zip(self.paths, embedded))]
        return self.aggregate(torch.cat(outs, 1))


class ReferenceMPViT(nn.Module):
    """Reference network with the form and the weights of a given :class:`mmvitzoo.models.MPViT`."""

    def __init__(self, model, num_heads=8):
        super().__init__()
        self.out_indices = model.out_indices
        self.stem = nn.Sequential(*(ReferenceConv(layer) for layer in model.stem))
        self.stages = nn.ModuleList(ReferenceStage(stage, num_heads) for stage in model.stages)
        self.load_state_dict(model.state_dict())

    def forward(self, x):
        """(B, 3, H, W) -> maps of the stages in ``out_indices``."""
        x, outs = self.stem(x), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
