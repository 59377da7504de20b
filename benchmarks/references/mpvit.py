"""MPViT as a paper's reader would write it first: tokens for transformers, maps for convolutions, one after the other.

It has the parameters of :class:`mmvitzoo.models.MPViT` under the same names.
"""

import torch
import torch.nn.functional as F
from torch import nn


class PlainConv(nn.Module):
    def __init__(self, like):
        super().__init__()
        conv = like.conv
        self.conv = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            groups=conv.groups,
            bias=False,
        )
        if like.with_norm:
            self.bn = nn.BatchNorm2d(conv.out_channels)
        self.with_norm, self.with_activation = like.with_norm, like.with_activation

    def forward(self, x):
        x = self.conv(x)
        if self.with_norm:
            x = self.bn(x)
        return F.hardswish(x) if self.with_activation else x


class PlainBlock(nn.Module):
    def __init__(self, dim, hidden, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))

    def forward(self, x, size, cpe, crpe):
        batch, tokens, dim = x.shape
        image = x.transpose(1, 2).reshape(batch, dim, *size)
        x = (cpe(image) + image).flatten(2).transpose(1, 2)
        y = self.attn['qkv'](self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        context = k.softmax(2).transpose(2, 3) @ v
        y = self.scale * (q @ context) + q * self.positions(v, size, crpe)
        x = x + self.attn['proj'](y.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x))))

    def positions(self, v, size, crpe):
        image = v.transpose(2, 3).reshape(len(v), -1, *size)
        parts = image.split([conv.in_channels for conv in crpe.convs], 1)
        image = torch.cat([conv(part) for conv, part in zip(crpe.convs, parts)], 1)
        return image.reshape(len(v), self.heads, -1, size[0] * size[1]).transpose(2, 3)


class PlainPath(nn.Module):
    def __init__(self, like, heads):
        super().__init__()
        dim = like.cpe.in_channels
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.crpe = nn.Module()
        self.crpe.convs = nn.ModuleList(
            nn.Conv2d(conv.in_channels, conv.in_channels, conv.kernel_size, padding=conv.padding, groups=conv.groups)
            for conv in like.crpe.convs
        )
        self.blocks = nn.ModuleList(PlainBlock(dim, block.mlp.fc1.out_features, heads) for block in like.blocks)

    def forward(self, x):
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, size, self.cpe, self.crpe)
        return tokens.transpose(1, 2).reshape(x.shape)


class PlainStage(nn.Module):
    def __init__(self, like, heads):
        super().__init__()
        self.patch_embeds = nn.ModuleList(
            nn.ModuleDict(
                dict(depthwise_conv=PlainConv(unit.depthwise_conv), pointwise_conv=PlainConv(unit.pointwise_conv))
            )
            for unit in like.patch_embeds
        )
        self.local = nn.Sequential(*(PlainConv(layer) for layer in like.local))
        self.paths = nn.ModuleList(PlainPath(path, heads) for path in like.paths)
        self.aggregate = PlainConv(like.aggregate)

    def forward(self, x):
        embedded = []
        for unit in self.patch_embeds:
            x = unit['pointwise_conv'](unit['depthwise_conv'](x))
            embedded.append(x)
        outs = [embedded[0] + self.local(embedded[0]), *(path(y) for path, y in zip(self.paths, embedded))]
        return self.aggregate(torch.cat(outs, 1))


class PlainMPViT(nn.Module):
    """The plain network of the same form and weights as a given :class:`mmvitzoo.models.MPViT`."""

    def __init__(self, model, heads=8):
        super().__init__()
        self.out_indices = model.out_indices
        self.stem = nn.Sequential(*(PlainConv(layer) for layer in model.stem))
        self.stages = nn.ModuleList(PlainStage(stage, heads) for stage in model.stages)
        self.load_state_dict(model.state_dict())

    def forward(self, x):
        x, outs = self.stem(x), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
