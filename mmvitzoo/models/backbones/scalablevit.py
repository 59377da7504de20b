"""ScalableViT: a pyramid whose blocks attend in windows that interact, and to a scaled image, in turns.

Yang et al., ECCV 2022, https://arxiv.org/abs/2203.10790

Interactive windowed self-attention (IWSA) adds a convolution over the values of the whole map to
attention in windows. Scalable self-attention (SSA) attends to the whole image, whose keys and
values a strided convolution reduces, with queries and keys of another width than the values.

The authors released the classifier. In dense prediction padding never changes what a valid pixel
sees (windows at the border are clipped), and each map that is returned has a LayerNorm of its own.

Maps are (B, H, W, C) between blocks.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import (
    Block,
    DepthwiseConv,
    Linear,
    attend_plain,
    merge_windows,
    partition_windows,
    split_linear,
    window_mask,
)
from .base import Backbone, count_weights, match_variant, weight_shape

NUM_STAGES = 4


class WindowAttention(nn.Module):
    """Interactive windowed self-attention (IWSA).

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads.
        window_size: Side of the square windows, in tokens. Windows that reach over the border are
            clipped.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = Linear(dim, 3 * dim)
        self.interact = DepthwiseConv(dim, 3)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        size = x.shape[1:3]
        q, k, v = split_linear(self.qkv, x, 3)
        local = self.interact(v)
        q, k, v = (partition_windows(y, self.window_size) for y in (q, k, v))
        tokens = (y.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        x = attend_plain(*tokens, mask=window_mask(size, self.window_size, x.shape[0], x.device))
        x = merge_windows(x.transpose(1, 2).reshape(q.shape), size)
        return self.proj(x + local)


class ScalableAttention(nn.Module):
    """Scalable self-attention (SSA).

    Args:
        dim: Channels of values and output, a multiple of ``num_heads``.
        num_heads: Heads.
        spatial_ratio: Stride of the convolution that reduces the map of keys and values; 1 does not
            reduce it. Maps that it does not divide are padded with zeros for the convolution.
        channel_ratio: Channels of queries and keys over ``dim`` in a reduced map; in any map it is
            in the scale of the scores.
    """

    def __init__(self, dim: int, num_heads: int, spatial_ratio: int, channel_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.spatial_ratio = spatial_ratio
        self.scale = (dim // num_heads * channel_ratio) ** -0.5
        if spatial_ratio > 1:
            width = int(dim * channel_ratio)
            self.q = Linear(dim, width)
            self.reduction = nn.Sequential(
                nn.Conv2d(dim, dim, spatial_ratio, spatial_ratio, groups=dim), nn.Conv2d(dim, width, 1)
            )
            self.norm = nn.LayerNorm(width, eps=1e-5)
            self.k = Linear(width, width)
            self.v = Linear(width, dim)
        else:
            self.q = Linear(dim, dim)
            self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        q = self.q(x)
        if self.spatial_ratio > 1:
            height, width = x.shape[1:3]
            y = F.pad(x, (0, 0, 0, -width % self.spatial_ratio, 0, -height % self.spatial_ratio))
            y = self.reduction(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = F.gelu(self.norm(y))
            k, v = self.k(y), self.v(y)
        else:
            k, v = self.kv(x).chunk(2, -1)
        tokens = (y.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.proj(attend_plain(*tokens, scale=self.scale).transpose(1, 2).reshape(x.shape))


class PatchEmbed(nn.Module):
    """Overlapping patches to tokens, normalised.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Side of a patch, in pixels of the input.
        stride: Distance of patches, in the same.
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int):
        super().__init__()
        self.projection = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H', W', C'), H' and W' are H and W divided by the stride, rounded up."""
        return self.norm(self.projection(x).permute(0, 2, 3, 1))


@MODELS.register_module()
class ScalableViT(Backbone):
    """ScalableViT (https://arxiv.org/abs/2203.10790).

    Maps have strides 4, 8, 16 and 32. What is returned has a LayerNorm of its own for each map;
    what the next stage reads has not.

    Args:
        arch: ``'small'``, ``'base'``, ``'large'``, or a dict of ``embed_dims``, ``num_layers``,
            ``num_heads``, ``spatial_ratios`` and ``channel_ratios``, each by stage.
        out_indices: Stages, from 0 on, whose maps are returned, in rising order. Stages after the
            last one are not built.
        window_size: Side of the attention windows, in tokens.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        frozen_stages: -1 trains everything, 0 freezes the first patch embedding, k it and the first
            k stages with their output norms.
        with_cp: Recompute blocks in the backward pass to save memory.
        init_cfg: MMEngine's initialisation. ``dict(type='Pretrained', checkpoint=PATH_OR_URL)``
            takes the authors' files.

    Raises:
        ValueError: An argument outside these ranges; the message says what is allowed.

    Examples:
        >>> import torch
        >>> from mmvitzoo.models import ScalableViT
        >>> model = ScalableViT('small', out_indices=(0, 1, 2, 3)).eval()
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 64, 16, 24), (1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    family = 'scalablevit'
    arch_zoo: Dict[str, Dict[str, Any]] = {
        'small': dict(
            embed_dims=(64, 128, 256, 512),
            num_layers=(2, 2, 20, 2),
            num_heads=(2, 4, 8, 16),
            spatial_ratios=(8, 4, 2, 1),
            channel_ratios=(1.25, 1.25, 1.25, 1),
        ),
        'base': dict(
            embed_dims=(96, 192, 384, 768),
            num_layers=(2, 2, 14, 6),
            num_heads=(3, 6, 12, 24),
            spatial_ratios=(8, 4, 2, 1),
            channel_ratios=(2, 1.25, 1.25, 1),
        ),
        'large': dict(
            embed_dims=(128, 256, 512, 1024),
            num_layers=(2, 6, 12, 4),
            num_heads=(4, 8, 16, 32),
            spatial_ratios=(8, 4, 2, 1),
            channel_ratios=(0.25, 0.5, 1, 1),
        ),
    }

    # A classifier has no norm but the last.
    may_lack = (r'norm0\..+', r'norm1\..+', r'norm2\..+')

    def __init__(
        self,
        arch: Union[str, Dict[str, Any]] = 'small',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        window_size: int = 7,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
    ):
        super().__init__(arch, NUM_STAGES, out_indices, drop_path_rate, frozen_stages, init_cfg=init_cfg)
        self._check_arch()
        if not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f'ScalableViT: window_size is a number of at least 1, got {window_size!r}')
        dims, num_layers = self.arch['embed_dims'], self.arch['num_layers']
        self.out_channels = tuple(dims)
        self.embeds, self.stages, self.positions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage in range(self.out_indices[-1] + 1):
            dim, heads = dims[stage], self.arch['num_heads'][stage]
            ratios = self.arch['spatial_ratios'][stage], self.arch['channel_ratios'][stage]
            self.embeds.append(PatchEmbed(dims[stage - 1], dim, 3, 2) if stage else PatchEmbed(3, dim, 7, 4))
            self.stages.append(nn.ModuleList())
            for i in range(num_layers[stage]):
                attn = ScalableAttention(dim, heads, *ratios) if i % 2 else WindowAttention(dim, heads, window_size)
                depth = sum(num_layers[:stage]) + i
                rate = drop_path_rate * depth / max(sum(num_layers) - 1, 1)
                self.stages[stage].append(Block(dim, attn, 4, rate, with_cp))
            self.positions.append(DepthwiseConv(dim, 3))
            if stage in self.out_indices:
                setattr(self, f'norm{stage}', nn.LayerNorm(dim, eps=1e-6))
        self.freeze()

    def _check_arch(self) -> None:
        for key, values in self.arch.items():
            numbers = (int, float) if key == 'channel_ratios' else int
            if (
                not isinstance(values, Sequence)
                or len(values) != NUM_STAGES
                or not all(isinstance(value, numbers) and value > 0 for value in values)
            ):
                raise ValueError(f'ScalableViT: {key} is a positive number for each of 4 stages, got {values!r}')
        for dim, heads, spatial, ratio in zip(
            *(self.arch[key] for key in ('embed_dims', 'num_heads', 'spatial_ratios', 'channel_ratios'))
        ):
            if dim % heads or (spatial > 1 and int(dim * ratio) % heads):
                raise ValueError(
                    'ScalableViT: num_heads divides embed_dims and embed_dims * channel_ratios, '
                    f'got {heads}, {dim} and {dim * ratio}'
                )

    def stages_to_freeze(self) -> List[nn.Module]:
        parts = [self.embeds[0]]
        for stage, blocks in enumerate(self.stages):
            modules = [blocks, self.positions[stage]]
            if stage:
                modules.append(self.embeds[stage])
            if stage in self.out_indices:
                modules.append(getattr(self, f'norm{stage}'))
            parts.append(nn.ModuleList(modules))
        return parts

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Normalised maps of the stages in ``out_indices``.

        Args:
            x: Images, (B, 3, H, W), H and W of at least 32 pixels.

        Returns:
            Per stage in ``out_indices`` a contiguous map of (B, ``embed_dims[stage]``, H', W'); H'
            and W' are H and W divided by 4, 8, 16 or 32, rounded up.

        Raises:
            ValueError: ``x`` is something else.
        """
        self.check_input(x)
        outs = []
        for stage, blocks in enumerate(self.stages):
            x = self.embeds[stage](x)
            for i, block in enumerate(blocks):
                x = block(x)
                if i == 0:
                    x = x + self.positions[stage](x)
            if stage in self.out_indices:
                outs.append(getattr(self, f'norm{stage}')(x).permute(0, 3, 1, 2).contiguous())
            x = x.permute(0, 3, 1, 2)
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rate decay.

        Args:
            param_name: Full name of a parameter.
            prefix: What stands before the backbone's own names, such as ``'backbone.'``.

        Returns:
            The depth and the number of depths: 0 is the first patch embedding, 1 to
            ``sum(num_layers)`` the blocks (a later patch embedding and the positions go with the
            first block of their stage), then the output norms and what follows the backbone.
        """
        num_layers = self.arch['num_layers']
        num_depths = sum(num_layers) + 2
        part, *rest = param_name[len(prefix) :].split('.')
        if not param_name.startswith(prefix) or part.startswith('norm'):
            return num_depths - 1, num_depths
        stage = int(rest[0])
        if part == 'embeds' and stage == 0:
            return 0, num_depths
        return 1 + sum(num_layers[:stage]) + (int(rest[1]) if part == 'stages' else 0), num_depths

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Infers the config.

        Assumes heads of 32 channels or a little more, windows of 7 x 7 tokens, and a channel ratio of 1 where the map
        is not reduced.
        """
        arch: Dict[str, tuple] = dict.fromkeys(cls.arch_zoo['small'], ())
        num_stages = count_weights(state_dict, 'patch_embeds.{}.norm.weight')
        for stage in range(num_stages):
            (dim,) = weight_shape(state_dict, f'patch_embeds.{stage}.norm.weight', 1)
            attn = f'stages.{stage}.1.attn'  # a block with scalable attention
            reduced = f'{attn}.reduction.0.weight' in state_dict
            ratio = weight_shape(state_dict, f'{attn}.reduction.0.weight', 4)[-1] if reduced else 1
            qk_dim = weight_shape(state_dict, f'{attn}.q.weight', 2)[0] if reduced else dim
            heads = next(n for n in range(max(dim // 32, 1), 0, -1) if dim % n == qk_dim % n == 0)
            arch['embed_dims'] += (dim,)
            arch['num_layers'] += (count_weights(state_dict, f'stages.{stage}.{{}}.norm1.weight'),)
            arch['num_heads'] += (heads,)
            arch['spatial_ratios'] += (ratio,)
            arch['channel_ratios'] += (qk_dim / dim,)
        cfg: Dict[str, Any] = dict(type=cls.__name__, arch=match_variant(cls.arch_zoo, arch, num_stages))
        out_indices = tuple(stage for stage in range(NUM_STAGES) if f'norm{stage}.weight' in state_dict)
        if out_indices != tuple(range(NUM_STAGES)):
            cfg['out_indices'] = out_indices
        assumed: Dict[str, Any] = dict(num_heads=arch['num_heads'], window_size=7)
        if 1 in arch['spatial_ratios']:
            assumed['channel_ratios'] = arch['channel_ratios']
        return cfg, assumed
