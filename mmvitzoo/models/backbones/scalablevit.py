"""ScalableViT: Rethinking the Context-oriented Generalization of Vision Transformer.

Yang et al., ECCV 2022, https://arxiv.org/abs/2203.10790

A pyramid whose blocks alternate between two kinds of attention. Interactive windowed self-attention (IWSA) adds a
convolution over the values of the whole map to attention in windows. Scalable self-attention (SSA) attends globally
to keys and values that a strided convolution reduces; queries and keys have another width than the values.

The authors released the classifier. For dense prediction, padding never changes what a valid pixel sees (windows at
the border are clipped), and each returned map has a LayerNorm of its own.

Maps are (B, H, W, C) between blocks.
"""

from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from mmengine.registry import MODELS
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import (
    DepthwiseConv,
    OverlapPatchEmbed,
    pad_to_multiple,
    sdpa,
    split_heads,
    window_mask,
    window_partition,
    window_unpartition,
)
from ..layers.attention import query_weights
from .base import AttentionLayer, Backbone, count_weights, drop_path_rates, match_variant, weight_shape

# torch.fx records calls of wrapped functions instead of tracing their branches on sizes.
for _function in (
    'pad_to_multiple',
    'rearrange',
    'sdpa',
    'split_heads',
    'window_mask',
    'window_partition',
    'window_unpartition',
):
    torch.fx.wrap(_function)

NUM_STAGES = 4


class WindowAttention(nn.Module):
    """Interactive windowed self-attention (IWSA).

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Number of heads.
        window_size: Side of the square windows in tokens. Windows that reach over the border are clipped.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.local_interaction = DepthwiseConv(dim, 3)  # LIM
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        size = x.shape[1:3]
        qkv = self.qkv(x)
        local = self.local_interaction(qkv.chunk(3, -1)[2])
        qkv = window_partition(qkv, self.window_size)  # (B * windows, window_size, window_size, 3 * C)
        q, k, v = qkv.chunk(3, -1)
        q, k, v = (split_heads(y, self.num_heads) for y in (q, k, v))  # (B * windows, heads, N, head_dim)
        y = sdpa(q, k, v, mask=window_mask(size, self.window_size, x.shape[0], x.device))
        y = rearrange(y, 'b heads (h w) c -> b h w (heads c)', h=self.window_size)
        return self.proj(window_unpartition(y, size) + local)

    def attention_weights(self, x: Tensor, window: int, token: int) -> Tensor:
        """Returns the weights of one query, see :meth:`.Attention.attention_weights`."""
        size = x.shape[1:3]
        qkv = window_partition(self.qkv(x), self.window_size)[window, None]
        q, k, _ = (split_heads(y, self.num_heads) for y in qkv.chunk(3, -1))
        mask = window_mask(size, self.window_size, x.shape[0], x.device)
        mask = None if mask is None else mask[window, 0, 0]
        return query_weights(q, k, token, q.shape[-1] ** -0.5, mask)[0]


class ScalableAttention(nn.Module):
    """Scalable self-attention (SSA).

    Args:
        dim: Channels of values and output, a multiple of ``num_heads``.
        num_heads: Number of heads.
        spatial_ratio: Stride of the convolution that reduces the map of keys and values; 1 does not reduce it. Maps
            that it does not divide are padded with zeros for the convolution.
        channel_ratio: Channels of queries and keys divided by ``dim``, for a reduced map. The scale of the scores
            includes it for any map.
    """

    def __init__(self, dim: int, num_heads: int, spatial_ratio: int, channel_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.spatial_ratio = spatial_ratio
        self.scale = (dim // num_heads * channel_ratio) ** -0.5
        if spatial_ratio > 1:
            width = int(dim * channel_ratio)
            self.q = nn.Linear(dim, width)
            self.reduction = nn.Sequential(
                nn.Conv2d(dim, dim, spatial_ratio, spatial_ratio, groups=dim), nn.Conv2d(dim, width, 1)
            )
            self.norm = nn.LayerNorm(width, eps=1e-5)
            self.k = nn.Linear(width, width)
            self.v = nn.Linear(width, dim)
        else:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def _qkv(self, x: Tensor) -> List[Tensor]:
        """(B, H, W, C) -> queries of (B, heads, H * W, Cq), keys of (B, heads, N, Cq), values of (B, heads, N, Cv)."""
        if self.spatial_ratio > 1:
            y = pad_to_multiple(x, self.spatial_ratio)
            y = self.reduction(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = F.gelu(self.norm(y))
            k, v = self.k(y), self.v(y)
        else:
            k, v = self.kv(x).chunk(2, -1)
        return [split_heads(y, self.num_heads) for y in (self.q(x), k, v)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        y = sdpa(*self._qkv(x), scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def attention_weights(self, x: Tensor, window: int, token: int) -> Tensor:
        """Returns the weights of one query, see :meth:`.Attention.attention_weights`; ``window`` is 0."""
        q, k, _ = self._qkv(x)
        return query_weights(q, k, token, self.scale)[0]


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        dim: Channels.
        attn: Attention layer.
        drop_path: Stochastic depth rate.
        with_cp: Use activation checkpointing.
    """

    def __init__(self, dim: int, attn: nn.Module, drop_path: float, with_cp: bool):
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""

        def inner_forward(x: Tensor) -> Tensor:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))

        if self.with_cp and self.training:
            return checkpoint(inner_forward, x, use_reentrant=False)
        return inner_forward(x)


@MODELS.register_module()
class ScalableViT(Backbone):
    """ScalableViT (https://arxiv.org/abs/2203.10790).

    Maps have strides 4, 8, 16 and 32. Each returned map is normalized by a LayerNorm of its own; the next stage reads
    the map before this norm. See :class:`.Backbone` for the arguments that all backbones share.

    Args:
        arch: ``'small'``, ``'base'``, ``'large'``, or a dict of ``embed_dims``, ``num_layers``, ``num_heads``,
            ``spatial_ratios`` and ``channel_ratios``, each by stage.
        out_indices: Stages from 0 to 3 whose maps are returned.
        window_size: Side of the attention windows in tokens.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1).
        frozen_stages: -1 trains everything, 0 freezes the first patch embedding, k also the first k stages with
            their output norms.
        with_cp: Use activation checkpointing in training.
        init_cfg: Initialization config of MMEngine.
        pretrained: Path or address of a checkpoint, short for ``init_cfg``.
        in_channels: Channels of the images, see :class:`.Backbone`.

    Raises:
        ValueError: An argument is outside these ranges; the message says what is allowed.

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

    # A classifier has only the last norm.
    optional_keys = (r'norm0\..+', r'norm1\..+', r'norm2\..+')
    first_convs = ('patch_embeds.0.proj',)

    def __init__(
        self,
        arch: Union[str, Dict[str, Any]] = 'small',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        window_size: int = 7,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
        pretrained: Optional[str] = None,
        in_channels: int = 3,
    ):
        super().__init__(
            arch,
            num_outputs=NUM_STAGES,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            init_cfg=init_cfg,
            pretrained=pretrained,
            in_channels=in_channels,
        )
        self._check_arch()
        self._check_flags(with_cp=with_cp)
        self._check_number('window_size', window_size)
        dims, num_layers = self.arch['embed_dims'], self.arch['num_layers']
        self.out_channels = tuple(dims)
        self.patch_embeds, self.stages, self.pos_embeds = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        rates = iter(drop_path_rates(drop_path_rate, sum(num_layers)))
        for stage in range(self.out_indices[-1] + 1):
            dim, num_heads = dims[stage], self.arch['num_heads'][stage]
            ratios = self.arch['spatial_ratios'][stage], self.arch['channel_ratios'][stage]
            norm = nn.LayerNorm(dim, eps=1e-6)
            patch = (dims[stage - 1], dim, 3, 2) if stage else (in_channels, dim, 7, 4)
            self.patch_embeds.append(OverlapPatchEmbed(*patch, norm))
            self.stages.append(nn.ModuleList())
            for i in range(num_layers[stage]):
                if i % 2:
                    attn = ScalableAttention(dim, num_heads, *ratios)
                else:
                    attn = WindowAttention(dim, num_heads, window_size)
                self.stages[stage].append(Block(dim, attn, next(rates), with_cp))
            self.pos_embeds.append(DepthwiseConv(dim, 3))  # PEG
            if stage in self.out_indices:
                setattr(self, f'norm{stage}', nn.LayerNorm(dim, eps=1e-6))
        self.finish_init()

    def _check_arch(self) -> None:
        for key, values in self.arch.items():
            self._check_stages(key, values, NUM_STAGES, (int, float) if key == 'channel_ratios' else int)
        keys = ('embed_dims', 'num_heads', 'spatial_ratios', 'channel_ratios')
        for dim, num_heads, spatial_ratio, channel_ratio in zip(*(self.arch[key] for key in keys)):
            if dim % num_heads or (spatial_ratio > 1 and int(dim * channel_ratio) % num_heads):
                self._fail(
                    'num_heads divides embed_dims and embed_dims * channel_ratios, '
                    f'got {num_heads}, {dim} and {dim * channel_ratio}'
                )

    def stages_to_freeze(self) -> List[List[Union[nn.Module, nn.Parameter]]]:
        stages = [[self.patch_embeds[0]]]
        for stage, blocks in enumerate(self.stages):
            parts = [blocks, self.pos_embeds[stage]]
            if stage:
                parts.append(self.patch_embeds[stage])
            if stage in self.out_indices:
                parts.append(getattr(self, f'norm{stage}'))
            stages.append(parts)
        return stages

    def attention_layers(self) -> List[AttentionLayer]:
        layers: List[AttentionLayer] = []
        for stage, blocks in enumerate(self.stages):
            stride = self.strides[stage]
            for block in blocks:
                attn = block.attn
                index = (len(layers), stage)
                if isinstance(attn, WindowAttention):
                    layer = AttentionLayer(*index, 'window', attn, stride, stride, attn.window_size * stride)
                else:
                    k_stride = stride * attn.spatial_ratio
                    layer = AttentionLayer(*index, 'scalable', attn, stride, k_stride, overlapping_keys=False)
                layers.append(layer)
        return layers

    def stage_maps(self, x: Tensor) -> Iterator[Tuple[Tensor, Optional[Tensor]]]:
        for stage, blocks in enumerate(self.stages):
            if stage > 0:
                x = x.permute(0, 3, 1, 2)
            x = self.patch_embeds[stage](x)  # (B, C, H, W) -> (B, H', W', C')
            for i, block in enumerate(blocks):
                x = block(x)
                if i == 0:
                    x = x + self.pos_embeds[stage](x)
            yield x, None

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        # Later patch embeddings and position encodings belong to the first block of their stage.
        num_layers = self.arch['num_layers']
        num_depths = sum(num_layers) + 2
        part, *rest = param_name[len(prefix) :].split('.')
        if not param_name.startswith(prefix) or part.startswith('norm'):
            return num_depths - 1, num_depths
        stage = int(rest[0])
        if part == 'patch_embeds' and stage == 0:
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
        cfg.update(cls.infer_in_channels(state_dict))
        out_indices = tuple(stage for stage in range(NUM_STAGES) if f'norm{stage}.weight' in state_dict)
        if out_indices != tuple(range(NUM_STAGES)):
            cfg['out_indices'] = out_indices
        assumed: Dict[str, Any] = dict(num_heads=arch['num_heads'], window_size=7)
        if 1 in arch['spatial_ratios']:
            assumed['channel_ratios'] = arch['channel_ratios']
        return cfg, assumed
