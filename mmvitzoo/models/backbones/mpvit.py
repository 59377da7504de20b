"""MPViT: Multi-Path Vision Transformer for Dense Prediction.

Lee et al., CVPR 2022, https://arxiv.org/abs/2112.11010

A convolutional stem at stride 4, then four stages at strides 4, 8, 16 and 32. A stage embeds its
input with a chain of depthwise separable convolutions; the n-th path reads the map after the n-th
of them, so that the paths see patches of 3 x 3, 5 x 5 and 7 x 7 at the cost of shared 3 x 3
kernels. Every path is a transformer whose attention is linear in the number of tokens; a
convolutional branch runs beside them, and a 1 x 1 convolution joins all.

Maps are (B, C, H, W) in channels-last memory around convolutions and their (B, H, W, C) views
inside the transformers, so that going from one to the other never copies.
"""

from itertools import islice
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import Block, DepthwiseConv, Linear, split_linear, without_autocast
from .base import Backbone, count_weights, match_variant, weight_shape

# Of 8 heads, 2 see relative positions through kernels of 3 x 3, 3 through 5 x 5, 3 through 7 x 7.
HEADS_OF_KERNEL = {3: 2, 5: 3, 7: 3}
NUM_HEADS = sum(HEADS_OF_KERNEL.values())


class ConvRelativePosition(nn.Module):
    """Relative positions as depthwise convolutions on the values (CRPE, from CoaT, https://arxiv.org/abs/2104.06399).

    Args:
        dim: Channels of the values, a multiple of 8.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.widths = [dim // NUM_HEADS * heads for heads in HEADS_OF_KERNEL.values()]
        self.convs = nn.ModuleList(DepthwiseConv(width, kernel) for width, kernel in zip(self.widths, HEADS_OF_KERNEL))

    def forward(self, v: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if v.device.type != 'cpu':
            return torch.cat([conv(x) for conv, x in zip(self.convs, v.split(self.widths, -1))], -1)
        # There, one convolution by the largest kernel is faster than cutting, three of them and joining.
        radius = max(HEADS_OF_KERNEL) // 2
        kernels = [F.pad(conv.weight, (radius - conv.padding[0],) * 4) for conv in self.convs]
        bias = torch.cat([conv.bias for conv in self.convs])
        v = v.permute(0, 3, 1, 2)
        v = F.conv2d(v, torch.cat(kernels), bias, padding=radius, groups=len(bias))
        return v.permute(0, 2, 3, 1)


class FactorizedAttention(nn.Module):
    """Attention of CoaT (https://arxiv.org/abs/2104.06399), whose cost is linear in the number of tokens.

    ``q @ (softmax(k)^T @ v) * (dim / 8)**-0.5``, the softmax over tokens, plus ``q * CRPE(v)``.

    Args:
        dim: Channels, a multiple of 8.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.scale = (dim // NUM_HEADS) ** -0.5
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, crpe: nn.Module) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); ``crpe`` belongs to the encoder, its blocks share it."""
        q, k, v = split_linear(self.qkv, x, 3)
        # Over many tokens the softmax is smaller than what half precision can hold.
        with without_autocast(x):
            k = k.flatten(1, 2).float().softmax(dim=1)
            k = rearrange(k, 'b n (heads c) -> b heads c n', heads=NUM_HEADS)
            context = self.scale * (k @ rearrange(v.float(), 'b h w (heads c) -> b heads (h w) c', heads=NUM_HEADS))
        content = rearrange(q, 'b h w (heads c) -> b heads (h w) c', heads=NUM_HEADS) @ context.to(q.dtype)
        content = rearrange(content, 'b heads (h w) c -> b h w (heads c)', h=x.shape[1])
        return self.proj(torch.addcmul(content, q, crpe(v)))


class PathBlock(Block):
    """Pre-norm transformer block; the position encodings are the encoder's.

    Args:
        dim: Channels, a multiple of 8.
        mlp_ratio: Width of the MLP over ``dim``.
        drop_path: Rate of stochastic depth.
        with_cp: Recompute the block in the backward pass.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, with_cp: bool):
        super().__init__(dim, FactorizedAttention(dim), mlp_ratio, drop_path, with_cp)

    def transform(self, x: Tensor, cpe: nn.Module, crpe: nn.Module) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), with an absolute and a relative position encoding."""
        x = x + cpe(x)
        x = x + self.drop_path(self.attn(self.norm1(x), crpe))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """One path: blocks that share one absolute and one relative position encoding.

    Args:
        dim: Channels, a multiple of 8.
        mlp_ratio: Width of the MLPs over ``dim``.
        drop_paths: Rate of stochastic depth of each block.
        with_cp: Recompute blocks in the backward pass.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_paths: Sequence[float], with_cp: bool):
        super().__init__()
        self.cpe = DepthwiseConv(dim, 3)
        self.crpe = ConvRelativePosition(dim)
        self.blocks = nn.ModuleList(PathBlock(dim, mlp_ratio, rate, with_cp) for rate in drop_paths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x, self.cpe, self.crpe)
        return x.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Multi-scale patch embedding, parallel paths, local branch and their aggregation.

    Args:
        dim: Channels of the input and of the paths, a multiple of 8.
        out_channels: Channels of the output.
        stride: Of the patch embedding.
        num_paths: Paths.
        mlp_ratio: Width of the MLPs over ``dim``.
        drop_paths: Rate of stochastic depth of each block of a path.
        norm_cfg: Norm of the convolutions.
        with_cp: Recompute transformer blocks in the backward pass.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        stride: int,
        num_paths: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        norm_cfg: dict,
        with_cp: bool,
    ):
        super().__init__()
        conv_cfg = dict(bias=False, norm_cfg=norm_cfg, act_cfg=dict(type='HSwish'))
        self.patch_embeds = nn.ModuleList(
            DepthwiseSeparableConvModule(
                dim, dim, 3, stride if i == 0 else 1, padding=1, dw_norm_cfg=None, dw_act_cfg=None, **conv_cfg
            )
            for i in range(num_paths)
        )
        self.local = nn.Sequential(
            ConvModule(dim, dim, 1, **conv_cfg),
            ConvModule(dim, dim, 3, padding=1, groups=dim, **conv_cfg),
            ConvModule(dim, dim, 1, **dict(conv_cfg, act_cfg=None)),
        )
        self.paths = nn.ModuleList(Encoder(dim, mlp_ratio, drop_paths, with_cp) for _ in range(num_paths))
        self.aggregate = ConvModule((num_paths + 1) * dim, out_channels, 1, **conv_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        embedded = []
        for patch_embed in self.patch_embeds:
            x = patch_embed(x)
            embedded.append(x)
        outs = [embedded[0] + self.local(embedded[0])]
        outs += [path(x) for path, x in zip(self.paths, embedded)]
        return self.aggregate(torch.cat(outs, dim=1))


@MODELS.register_module()
class MPViT(Backbone):
    """Multi-Path Vision Transformer (https://arxiv.org/abs/2112.11010).

    The maps of stages 1 to 4 have strides 4, 8, 16, 32 and ``self.out_channels`` channels: a
    stage's aggregation already widens to the next stage's width, so MPViT-S gives 128, 216, 288
    and 288.

    Args:
        arch: ``'tiny'``, ``'xsmall'``, ``'small'``, ``'base'``, or a dict of four-element
            sequences ``num_paths``, ``num_layers``, ``embed_dims`` (multiples of 8: the paper's
            heads are always 8) and ``mlp_ratios``.
        out_indices: Stages, 0 to 3 and in rising order, whose maps are returned. Stages after the
            last one are not built.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        norm_cfg: Norm of the convolutional parts, for :func:`mmcv.cnn.build_norm_layer`.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages.
        norm_eval: Keep every BatchNorm in eval mode while training.
        with_cp: Recompute transformer blocks in the backward pass to save memory.
        init_cfg: MMEngine's initialisation. ``dict(type='Pretrained', checkpoint=PATH_OR_URL)``
            takes files of the original repositories as well as converted ones.

    Raises:
        ValueError: An argument outside these ranges; the message says what is allowed.

    Examples:
        >>> import torch
        >>> from mmvitzoo.models import MPViT
        >>> model = MPViT('tiny').eval()
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 176, 8, 12), (1, 216, 4, 6), (1, 216, 2, 3)]
    """

    family = 'mpvit'
    arch_zoo = {
        'tiny': dict(
            num_paths=(2, 3, 3, 3), num_layers=(1, 2, 4, 1), embed_dims=(64, 96, 176, 216), mlp_ratios=(2, 2, 2, 2)
        ),
        'xsmall': dict(
            num_paths=(2, 3, 3, 3), num_layers=(1, 2, 4, 1), embed_dims=(64, 128, 192, 256), mlp_ratios=(4, 4, 4, 4)
        ),
        'small': dict(
            num_paths=(2, 3, 3, 3), num_layers=(1, 3, 6, 3), embed_dims=(64, 128, 216, 288), mlp_ratios=(4, 4, 4, 4)
        ),
        'base': dict(
            num_paths=(2, 3, 3, 3), num_layers=(1, 3, 8, 3), embed_dims=(128, 224, 368, 480), mlp_ratios=(4, 4, 4, 4)
        ),
    }

    def __init__(
        self,
        arch: Union[str, Dict[str, Sequence]] = 'tiny',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        norm_cfg: dict = dict(type='BN'),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
    ):
        super().__init__(arch, 4, out_indices, drop_path_rate, frozen_stages, norm_eval, init_cfg)
        for name, values in self.arch.items():
            numbers = (int, float) if name == 'mlp_ratios' else int
            if (
                not isinstance(values, Sequence)
                or len(values) != 4
                or not all(isinstance(value, numbers) and value > 0 for value in values)
            ):
                raise ValueError(f'MPViT: {name} is a positive number for each of 4 stages, got {values!r}')
        dims = tuple(self.arch['embed_dims'])
        if any(dim % NUM_HEADS for dim in dims):
            raise ValueError(f'MPViT: embed_dims are multiples of {NUM_HEADS}, got {dims}')

        conv_cfg = dict(stride=2, padding=1, bias=False, norm_cfg=norm_cfg, act_cfg=dict(type='HSwish'))
        self.stem = nn.Sequential(
            ConvModule(3, dims[0] // 2, 3, **conv_cfg), ConvModule(dims[0] // 2, dims[0], 3, **conv_cfg)
        )
        num_layers = self.arch['num_layers']
        last = sum(num_layers) - 1
        rates = iter([drop_path_rate * i / max(last, 1) for i in range(last + 1)])
        self.out_channels = dims[1:] + dims[-1:]
        self.stages = nn.ModuleList(
            Stage(
                dim=dims[i],
                out_channels=self.out_channels[i],
                stride=1 if i == 0 else 2,
                num_paths=self.arch['num_paths'][i],
                mlp_ratio=self.arch['mlp_ratios'][i],
                drop_paths=list(islice(rates, num_layers[i])),
                norm_cfg=norm_cfg,
                with_cp=with_cp,
            )
            for i in range(self.out_indices[-1] + 1)
        )
        self.freeze()

    def stages_to_freeze(self) -> List[nn.Module]:
        return [self.stem, *self.stages]

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Maps of the stages in ``out_indices``.

        Args:
            x: Images, (B, 3, H, W), H and W of at least 32 pixels.

        Returns:
            Per stage i in ``out_indices`` a contiguous map of (B, ``out_channels[i]``, H_i, W_i);
            H_i and W_i are H and W divided by 4, 8, 16, 32, rounded up.

        Raises:
            ValueError: ``x`` is something else.
        """
        self.check_input(x)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                # mmcv's operators read a map's memory as if it were contiguous, RoIAlign for one.
                outs.append(x.contiguous())
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter, for MMPretrain's layer-wise learning rate decay.

        Args:
            param_name: Full name of a parameter.
            prefix: What stands before the backbone's own names, such as ``'backbone.'``.

        Returns:
            The depth and the number of depths: 0 is the stem, 1 to ``sum(num_layers)`` the blocks
            (parallel ones share a depth; patch embedding, local branch and position encodings go
            with the first block of their stage, the aggregation with the last), then what follows
            the backbone.
        """
        num_layers = self.arch['num_layers']
        num_depths = sum(num_layers) + 2
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        part, stage, *rest = param_name[len(prefix) :].split('.')
        if part == 'stem':
            return 0, num_depths
        first = 1 + sum(num_layers[: int(stage)])
        if rest[0] == 'aggregate':
            return first + num_layers[int(stage)] - 1, num_depths
        block = int(rest[3]) if rest[2] == 'blocks' else 0
        return first + block, num_depths

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        arch: Dict[str, tuple] = dict.fromkeys(cls.arch_zoo['tiny'], ())
        num_stages = count_weights(state_dict, 'stages.{}.paths.0.cpe.weight')
        for stage in range(num_stages):
            blocks = f'stages.{stage}.paths.0.blocks'
            hidden_dim, dim = weight_shape(state_dict, f'{blocks}.0.mlp.fc1.weight', 2)
            arch['num_paths'] += (count_weights(state_dict, f'stages.{stage}.paths.{{}}.cpe.weight'),)
            arch['num_layers'] += (count_weights(state_dict, f'{blocks}.{{}}.norm1.weight'),)
            arch['embed_dims'] += (dim,)
            arch['mlp_ratios'] += (hidden_dim / dim,)
        cfg = dict(type=cls.__name__, arch=match_variant(cls.arch_zoo, arch, num_stages))
        if num_stages < 4:
            cfg['out_indices'] = tuple(range(num_stages))
        return cfg, {}
