"""MViTv2: multiscale vision transformers, for classification and dense prediction.

Li et al., CVPR 2022, https://arxiv.org/abs/2112.01526

Four stages, each of half the resolution and twice the channels of the one before. Attention pools
its queries, keys and values with strided depthwise convolutions; the first block of a stage pools
its queries to the stage's resolution. Scores have decomposed relative positions, and the pooled
queries are added to what attention returns.

A classifier attends to the whole image. In dense prediction most blocks attend in windows, and the
last one of each stage but the first to the whole image. Both are one network with the same weights.

Maps are (B, H, W, C) between blocks.
"""

import re
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from ...checkpoints import Converted
from ..layers import (
    Linear,
    Mlp,
    Recomputed,
    RelativeAttention,
    attend,
    init_linear_weights,
    is_compiling,
    merge_windows,
    partition_windows,
    split_linear,
)
from .base import Backbone, weight_shape

NUM_STAGES = 4
# By stage: side of the attention windows, and stride of keys and values, both in its tokens.
WINDOW_SIZES = (56, 28, 14, 7)
STRIDES_KV = (4, 2, 1, 1)


class PoolingAttention(RelativeAttention):
    """Multi-head attention whose queries, keys and values are pooled maps.

    Args:
        dim: Channels of the input.
        out_dim: Channels of queries, keys, values and the output; a multiple of ``num_heads``.
        num_heads: Heads.
        stride_q: Stride by which queries are pooled, and so of the output.
        stride_kv: Stride by which keys and values are pooled.
        window_size: Side of the square windows in tokens of the input, a multiple of both strides;
            0 attends to all. Pooled maps that their windows do not divide are padded with zeros,
            which attend and are attended to.
        rel_pos_size: See :class:`mmvitzoo.models.layers.RelativeAttention`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int,
        stride_q: int,
        stride_kv: int,
        window_size: int,
        rel_pos_size: Tuple[int, int],
    ):
        head_dim = out_dim // num_heads
        super().__init__(head_dim, rel_pos_size)
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = Linear(dim, 3 * out_dim)
        for name, stride in (('q', stride_q), ('k', stride_kv), ('v', stride_kv)):
            pool = nn.Conv2d(head_dim, head_dim, 3, stride, padding=1, groups=head_dim, bias=False)
            setattr(self, f'pool_{name}', pool)  # one for all heads
            setattr(self, f'norm_{name}', nn.LayerNorm(head_dim, eps=1e-6))
        self.proj = Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C'), H' and W' are H and W divided by ``stride_q``, rounded up."""
        q, k, v = (self.pooled(y, name) for y, name in zip(split_linear(self.qkv, x, 3), 'qkv'))
        size = q.shape[1:3]
        if self.window_size:
            strides = (self.pool_q.stride[0], self.pool_k.stride[0], self.pool_v.stride[0])
            q, k, v = (partition_windows(y, self.window_size // s) for y, s in zip((q, k, v), strides))
        tables = self.tables(q.shape[1:3], k.shape[1:3])
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        tokens = (y.flatten(1, 2).transpose(1, 2) for y in (q, k, v))  # (B, heads, N, C)
        x = (attend(*tokens, *tables).transpose(1, 2).view_as(q) + q).flatten(3)
        if self.window_size:
            x = merge_windows(x, size)
        return self.proj(x)

    def pooled(self, x: Tensor, name: str) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C), pooled and normalised as what ``name`` says.

        Args:
            x: A map of one of the three.
            name: ``'q'``, ``'k'`` or ``'v'``; the stride by which H and W are divided is its own.
        """
        conv, norm = getattr(self, f'pool_{name}'), getattr(self, f'norm_{name}')
        kernels = conv.weight.repeat(self.num_heads, 1, 1, 1)
        x = x.permute(0, 3, 1, 2)
        x = F.conv2d(x, kernels, stride=conv.stride, padding=1, groups=len(kernels)).permute(0, 2, 3, 1)
        return norm(x.unflatten(-1, (self.num_heads, -1))).flatten(3)


class PoolingBlock(Recomputed):
    """Pre-norm transformer block with pooling attention.

    Args:
        dim: Channels of the input.
        attn_dim: Channels of the attention and after it.
        out_dim: Channels of the output.
        drop_path: Rate of stochastic depth.
        with_cp: Recompute the block in the backward pass.
        stride_q: Stride of the block.
        **attention: See :class:`PoolingAttention`.
    """

    def __init__(
        self,
        dim: int,
        attn_dim: int,
        out_dim: int,
        drop_path: float = 0.0,
        with_cp: bool = False,
        stride_q: int = 1,
        **attention: Any,
    ):
        super().__init__(with_cp)
        self.stride = stride_q
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PoolingAttention(dim, attn_dim, stride_q=stride_q, **attention)
        self.norm2 = nn.LayerNorm(attn_dim, eps=1e-6)
        self.mlp = Mlp(attn_dim, 4 * attn_dim, out_dim)
        # Of the part, attention or MLP, in which the width changes; no block has both.
        self.skip = None if dim == out_dim else Linear(dim, out_dim)
        self.widens_in_attention = dim != attn_dim
        self.drop_path = DropPath(drop_path)

    def transform(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C'), H' and W' are H and W divided by ``stride_q``, rounded up."""
        # Where the width changes, the skip connection starts at the normalised input.
        y = self.norm1(x)
        skip = self.skip(y) if self.widens_in_attention else x
        if self.stride > 1:
            skip = pool(skip, self.stride)
        x = skip + self.drop_path(self.attn(y))
        y = self.norm2(x)
        skip = self.skip(y) if self.skip and not self.widens_in_attention else x
        return skip + self.drop_path(self.mlp(y))


def pool(x: Tensor, stride: int) -> Tensor:
    """(B, H, W, C) -> (B, H', W', C), the largest of 3 x 3; H' and W' are H and W over ``stride``, rounded up."""
    x = x.permute(0, 3, 1, 2)
    if not is_compiling():
        return F.max_pool2d(x, 3, stride, padding=1).permute(0, 2, 3, 1)
    # Padded to what the stride divides: a compiler would ask whether it does, once for every stage.
    height, width = x.shape[2:]
    rows, cols = (height + stride - 1) // stride, (width + stride - 1) // stride
    padding = (1, stride * (cols - 1) + 2 - width, 1, stride * (rows - 1) + 2 - height)
    return F.max_pool2d(F.pad(x, padding, value=-torch.inf), 3, stride).permute(0, 2, 3, 1)


@MODELS.register_module()
class MViTv2(Backbone):
    """Multiscale vision transformer, version 2 (https://arxiv.org/abs/2112.01526).

    Maps have strides 4, 8, 16 and 32. What is returned has a LayerNorm of its own for each map;
    what the next stage reads has not.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, ``'huge'``, or a dict of
            ``embed_dims`` and ``num_heads`` (of the first stage, doubled in each later one),
            ``num_layers`` (of all stages) and ``downscale_indices`` (the first block of each stage
            but the first).
        img_size: Pixels a side, or (H, W), for which relative positions are learned. Images of any
            other size interpolate them.
        out_indices: Stages, from 0 on, whose maps are returned, in rising order. Blocks after the
            last one are not built.
        window_attention: Attend in windows of 56, 28, 14 and 7 tokens, by stage, but for the last
            block of stages 1, 2 and 3, whose keys and values are pooled twice as much in stages 1
            and 2: the detection form of the network. The classification form, False, is slow for
            large images.
        dim_mul_in_attention: Double the channels in the attention of a stage's first block, not in
            the MLP of the block before. Every published model does, but for large's classifier
            trained on ImageNet-1k alone; the last map of a stage but the last has the width
            of the next stage there.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        frozen_stages: -1 trains everything, 0 freezes the patch embedding, k it and the first k
            stages with their output norms.
        with_cp: Recompute blocks in the backward pass to save memory.
        init_cfg: MMEngine's initialisation. ``dict(type='Pretrained', checkpoint=PATH_OR_URL)``
            takes files of the authors, Detectron2, timm and MMPretrain.

    Raises:
        ValueError: An argument outside these ranges; the message says what is allowed.

    Examples:
        >>> import torch
        >>> from mmvitzoo.models import MViTv2
        >>> model = MViTv2('tiny', out_indices=(0, 1, 2, 3), window_attention=True).eval()
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    """

    family = 'mvitv2'
    arch_zoo: Dict[str, Dict[str, Any]] = {
        'tiny': dict(embed_dims=96, num_layers=10, num_heads=1, downscale_indices=(1, 3, 8)),
        'small': dict(embed_dims=96, num_layers=16, num_heads=1, downscale_indices=(1, 3, 14)),
        'base': dict(embed_dims=96, num_layers=24, num_heads=1, downscale_indices=(2, 5, 21)),
        'large': dict(embed_dims=144, num_layers=48, num_heads=2, downscale_indices=(2, 8, 44)),
        'huge': dict(embed_dims=192, num_layers=80, num_heads=3, downscale_indices=(4, 12, 72)),
    }

    # A classifier has no norm but the last.
    may_lack = (r'norm0\..+', r'norm1\..+', r'norm2\..+')
    init_module = staticmethod(init_linear_weights)

    def __init__(
        self,
        arch: Union[str, Dict[str, Any]] = 'base',
        img_size: Union[int, Sequence[int]] = 224,
        out_indices: Sequence[int] = (3,),
        window_attention: bool = False,
        dim_mul_in_attention: bool = True,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
    ):
        super().__init__(arch, NUM_STAGES, out_indices, drop_path_rate, frozen_stages, init_cfg=init_cfg)
        self._check_arch()
        size = img_size if isinstance(img_size, Sequence) else (img_size, img_size)
        if len(size) != 2 or not all(isinstance(side, int) and side >= 32 for side in size):
            raise ValueError(f'MViTv2: img_size is a number of pixels, at least 32, or (H, W), got {img_size!r}')
        dim, num_heads, num_layers = (self.arch[key] for key in ('embed_dims', 'num_heads', 'num_layers'))
        self.dim_mul_in_attention = dim_mul_in_attention
        # Block at which each stage starts, and the number of blocks.
        self.starts = (0, *self.arch['downscale_indices'], num_layers)
        self.stem = nn.Conv2d(3, dim, 7, stride=4, padding=3)
        grid = tuple(-(-side // 4) for side in size)
        self.blocks = nn.ModuleList()
        for i in range(self.starts[self.out_indices[-1] + 1]):
            stage = sum(i >= start for start in self.starts[1:])
            first, last = i > 0 and i in self.starts, i + 1 in self.starts
            windowed = window_attention and not (last and stage > 0)
            stride_q = 2 if first else 1
            stride_kv = STRIDES_KV[stage] * (2 if window_attention and last and stage in (1, 2) else 1)
            # The first block of a stage still reads, and cuts into windows, a map of the stage before.
            window_size = WINDOW_SIZES[stage - first] if windowed else 0
            area = (window_size, window_size) if windowed else grid
            num_heads *= stride_q
            attn_dim = 2 * dim if first and dim_mul_in_attention else dim
            doubled = not dim_mul_in_attention and last and stage + 1 < NUM_STAGES
            out_dim = 2 * attn_dim if doubled else attn_dim
            block = PoolingBlock(
                dim,
                attn_dim,
                out_dim,
                drop_path=drop_path_rate * i / max(num_layers - 1, 1),
                with_cp=with_cp,
                num_heads=num_heads,
                stride_q=stride_q,
                stride_kv=stride_kv,
                window_size=window_size,
                rel_pos_size=tuple(-(-side // min(stride_q, stride_kv)) for side in area),
            )
            self.blocks.append(block)
            dim = out_dim
            grid = tuple(-(-side // stride_q) for side in grid)
        widths = [block.mlp.fc2.out_features for block in self.blocks]
        for stage in self.out_indices:
            setattr(self, f'norm{stage}', nn.LayerNorm(widths[self.starts[stage + 1] - 1], eps=1e-6))
        embed_dims = self.arch['embed_dims']
        self.out_channels = tuple(
            embed_dims * 2 ** min(stage + (not dim_mul_in_attention), NUM_STAGES - 1) for stage in range(NUM_STAGES)
        )
        self.freeze()

    def _check_arch(self) -> None:
        for key in ('embed_dims', 'num_layers', 'num_heads'):
            if not isinstance(self.arch[key], int) or self.arch[key] <= 0:
                raise ValueError(f'MViTv2: {key} is a positive number, got {self.arch[key]!r}')
        if self.arch['embed_dims'] % self.arch['num_heads']:
            raise ValueError(
                f'MViTv2: embed_dims is a multiple of num_heads, '
                f'got {self.arch["embed_dims"]} and {self.arch["num_heads"]}'
            )
        starts, num_layers = self.arch['downscale_indices'], self.arch['num_layers']
        if (
            not isinstance(starts, Sequence)
            or len(starts) != NUM_STAGES - 1
            or list(starts) != sorted(set(starts) & set(range(1, num_layers)))
        ):
            raise ValueError(
                f'MViTv2: downscale_indices are three rising blocks from 1 to {num_layers - 1}, got {starts!r}'
            )

    def check_converted(self, converted: Converted) -> None:
        theirs = converted.backbone_cfg.get('dim_mul_in_attention', True)
        if converted.family == 'mvitv2' and theirs != self.dim_mul_in_attention:
            raise ValueError(
                f'the checkpoint is of a model with dim_mul_in_attention={theirs}, '
                f'the model has dim_mul_in_attention={self.dim_mul_in_attention}'
            )

    def init_weights(self) -> None:
        """Loads ``init_cfg``'s checkpoint, or initialises as the authors do, relative positions included."""
        fresh = not self.is_init and not self.init_cfg
        super().init_weights()
        if fresh:
            for block in self.blocks:
                trunc_normal_(block.attn.rel_pos_h, std=0.02)
                trunc_normal_(block.attn.rel_pos_w, std=0.02)

    def stages_to_freeze(self) -> List[nn.Module]:
        stages = []
        for stage in range(self.out_indices[-1] + 1):
            norm = [getattr(self, f'norm{stage}')] if stage in self.out_indices else []
            stages.append(nn.ModuleList([*self.blocks[self.starts[stage] : self.starts[stage + 1]], *norm]))
        return [self.stem, *stages]

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Normalised maps of the stages in ``out_indices``.

        Args:
            x: Images, (B, 3, H, W), H and W of at least 32 pixels.

        Returns:
            Per stage in ``out_indices`` a contiguous map of (B, C, H', W'). C is ``out_channels[stage]``, H'
            and W' are H and W divided by 4, 8, 16 or 32, rounded up.

        Raises:
            ValueError: ``x`` is something else.
        """
        self.check_input(x)
        x = self.stem(x).permute(0, 2, 3, 1).contiguous()
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            stage = self.starts.index(i + 1) - 1 if i + 1 in self.starts else None
            if stage in self.out_indices:
                outs.append(getattr(self, f'norm{stage}')(x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rate decay.

        Args:
            param_name: Full name of a parameter.
            prefix: What stands before the backbone's own names, such as ``'backbone.'``.

        Returns:
            The depth and the number of depths: 0 is the stem, 1 to ``num_layers`` the blocks, then
            the output norms and what follows the backbone.
        """
        num_depths = self.arch['num_layers'] + 2
        part, *rest = param_name[len(prefix) :].split('.')
        if not param_name.startswith(prefix) or part.startswith('norm'):
            return num_depths - 1, num_depths
        return 0 if part == 'stem' else int(rest[0]) + 1, num_depths

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Infers the config; the output norms of earlier stages are taken as a sign of ``window_attention``."""
        starts = stage_starts(state_dict)
        blocks = [re.match(r'blocks\.([0-9]+)\.', key) for key in state_dict]
        num_layers = 1 + max((int(match[1]) for match in blocks if match), default=0)
        ends = (*starts, num_layers)
        pool_shape = weight_shape(state_dict, 'blocks.0.attn.pool_q.weight', 4)
        proj_shape = weight_shape(state_dict, 'blocks.0.attn.proj.weight', 2)
        if proj_shape[0] % pool_shape[0]:
            raise ValueError(f'blocks.0.attn.pool_q and proj have weights of shapes {pool_shape} and {proj_shape}')
        arch: Dict[str, Any] = dict(
            embed_dims=weight_shape(state_dict, 'patch_embed.proj.weight', 4)[0],
            num_layers=num_layers,
            num_heads=proj_shape[0] // pool_shape[0],
            downscale_indices=tuple(starts),
        )
        # A backbone that returns only early maps has no later stages.
        for name, variant in cls.arch_zoo.items():
            variant_ends = (*variant['downscale_indices'], variant['num_layers'])[: len(ends)]
            if variant_ends == ends and all(variant[key] == arch[key] for key in ('embed_dims', 'num_heads')):
                arch = name
                break
        else:
            if len(ends) < NUM_STAGES:
                raise ValueError(f'blocks.{num_layers} is missing, and no published variant has these blocks')
        out_indices = tuple(stage for stage in range(NUM_STAGES) if f'norm{stage}.weight' in state_dict)
        windowed = out_indices not in ((), (NUM_STAGES - 1,))
        cfg: Dict[str, Any] = dict(type=cls.__name__, arch=arch)
        if windowed:
            cfg.update(window_attention=True, out_indices=out_indices)
        if starts:
            widths = [
                weight_shape(state_dict, f'blocks.{block}.norm{i}.weight', 1)
                for block, i in ((starts[0] - 1, 2), (starts[0], 1))
            ]
            if widths[0] != widths[1]:
                cfg['dim_mul_in_attention'] = False
        # The first block's tables are those of its window, if it has one; the last block's never are. If the last
        # block is also the first of its stage, its keys have the stride of the stage before.
        block, stride = (num_layers - 1, 4 * 2 ** len(starts)) if windowed and starts else (0, 4)
        if block in starts and len(starts) == NUM_STAGES - 1:
            stride //= 2
        lengths = [weight_shape(state_dict, f'blocks.{block}.attn.rel_pos_{axis}', 2)[0] for axis in 'hw']
        size = tuple(stride * (length + 1) // 2 for length in lengths)
        if size != (224, 224) and not (windowed and not starts):
            cfg['img_size'] = size[0] if size[0] == size[1] else size
        return cfg, dict(window_attention=windowed)


def stage_starts(state_dict: Dict[str, Tensor]) -> List[int]:
    """Returns the first block of each stage but the first: its attention is wider than the one before.

    Args:
        state_dict: Weights of a backbone, without a prefix.
    """
    widths: List[int] = []
    while f'blocks.{len(widths)}.attn.proj.weight' in state_dict:
        widths.append(weight_shape(state_dict, f'blocks.{len(widths)}.attn.proj.weight', 2)[0])
    return [block for block in range(1, len(widths)) if widths[block] > widths[block - 1]]
