"""MViTv2: Improved Multiscale Vision Transformers for Classification and Detection.

Li et al., CVPR 2022, https://arxiv.org/abs/2112.01526

Four stages, each with half the resolution and twice the channels of the one before. Attention pools queries, keys and
values with strided depthwise convolutions. The first block of a stage pools its queries to the resolution of the stage.
Scores have decomposed relative positions, and pooled queries are added to the output of attention.

A classifier attends globally. For dense prediction, blocks attend in windows, except the last block of stages 1, 2 and
3, which is global. Both forms have the same parameters; loading a checkpoint interpolates the tables of relative
positions.

Maps are (B, H, W, C) between blocks.
"""

import re
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from mmengine.registry import MODELS
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import (
    DepthwiseConv,
    OverlapPatchEmbed,
    RelPosAttention,
    init_linear_weights,
    window_partition,
    window_unpartition,
)
from ..layers.attention import query_weights
from ..layers.padding import ceil_div
from ..layers.rel_pos import concat_rel_pos
from .base import AttentionLayer, Backbone, drop_path_rates, weight_shape

# torch.fx records calls of wrapped functions instead of tracing their branches on sizes.
for _function in ('max_pool', 'rearrange', 'window_partition', 'window_unpartition'):
    torch.fx.wrap(_function)

NUM_STAGES = 4
# By stage, in tokens of the block's input. The first block of stages 1 to 3 reads a map of the resolution of the stage
# before, and takes the window of that stage.
WINDOW_SIZES = (56, 28, 14, 7)
STRIDES_KV = (4, 2, 1, 1)


class PoolingAttention(RelPosAttention):
    """Multi-head attention with pooled queries, keys and values.

    Args:
        dim: Channels of the input.
        out_dim: Channels of queries, keys, values and the output; a multiple of ``num_heads``.
        num_heads: Number of heads.
        stride_q: Pooling stride of the queries, and so of the output.
        stride_kv: Pooling stride of keys and values.
        window_size: Side of the square windows in tokens of the input, a multiple of both strides; 0 is global
            attention. Pooled queries, keys and values are padded with zeros to multiples of their windows. Padding is
            not masked.
        input_size: (H, W) in tokens of the relative positions, see :class:`.RelPosAttention`: that of the finer of the
            pooled queries and keys.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int,
        stride_q: int,
        stride_kv: int,
        window_size: int,
        input_size: Tuple[int, int],
    ):
        head_dim = out_dim // num_heads
        super().__init__(head_dim, input_size)
        self.num_heads = num_heads
        self.stride_q = stride_q
        self.stride_kv = stride_kv
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * out_dim)
        # All heads share a pooling convolution.
        self.pool_q = DepthwiseConv(head_dim, 3, stride_q, bias=False)
        self.pool_k = DepthwiseConv(head_dim, 3, stride_kv, bias=False)
        self.pool_v = DepthwiseConv(head_dim, 3, stride_kv, bias=False)
        self.norm_q = nn.LayerNorm(head_dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(head_dim, eps=1e-6)
        self.norm_v = nn.LayerNorm(head_dim, eps=1e-6)
        self.proj = nn.Linear(out_dim, out_dim)

    def pooled_qkv(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """(B, H, W, C) -> pooled and normalized q of (B * heads, Hq, Wq, D), k and v of (B * heads, Hkv, Wkv, D).

        D is head_dim. The sizes are H and W divided by the strides, rounded up.
        """
        # Heads are part of the batch from here on: pooling, windows and attention treat each head alike.
        # Contiguous, since convolutions would copy the strided maps of heads slowly.
        q, k, v = rearrange(
            self.qkv(x), 'b h w (n heads c) -> n (b heads) h w c', n=3, heads=self.num_heads
        ).contiguous()
        return self.norm_q(self.pool_q(q)), self.norm_k(self.pool_k(k)), self.norm_v(self.pool_v(v))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C'), H' and W' are H and W divided by ``stride_q``, rounded up."""
        q, k, v = self.pooled_qkv(x)  # (B * heads, Hq, Wq, head_dim), and (B * heads, Hkv, Wkv, head_dim) twice
        size = q.shape[1:3]
        if self.window_size:
            # (B * heads * windows, window, window, head_dim), with the windows of k and v pooled by another stride
            q = window_partition(q, self.window_size // self.stride_q)
            k = window_partition(k, self.window_size // self.stride_kv)
            v = window_partition(v, self.window_size // self.stride_kv)
        tokens = (y.flatten(1, 2)[:, None] for y in (q, k, v))  # (B * heads * windows, 1, N, head_dim)
        y = self.attention(*tokens, q.shape[1:3], k.shape[1:3])
        x = y.view_as(q) + q  # residual pooling connection
        if self.window_size:
            x = window_unpartition(x, size)
        return self.proj(rearrange(x, '(b heads) h w c -> b h w (heads c)', heads=self.num_heads))

    def attention_weights(self, x: Tensor, window: int, token: int) -> Tensor:
        """Returns the weights of one pooled query for the pooled keys, see :meth:`.Attention.attention_weights`."""
        q, k, _ = self.pooled_qkv(x)  # (heads, Hq, Wq, head_dim) and (heads, Hkv, Wkv, head_dim), of one image
        if self.window_size:  # (heads * windows, ...), of which one window of each head is taken
            q, k = (
                window_partition(y, self.window_size // stride).unflatten(0, (self.num_heads, -1))[:, window]
                for y, stride in ((q, self.stride_q), (k, self.stride_kv))
            )
        rel_h, rel_w = self.gather_rel_pos(q.shape[1:3], k.shape[1:3])
        q, k, scale = concat_rel_pos(q.flatten(1, 2)[:, None], k.flatten(1, 2)[:, None], rel_h, rel_w)
        return query_weights(q, k, token, scale)[:, 0]  # the heads are the batch here


class PoolingBlock(nn.Module):
    """Pre-norm transformer block with pooling attention.

    Args:
        dim: Channels of the input.
        attn_dim: Channels of the output of attention and of the input of the MLP.
        out_dim: Channels of the output.
        drop_path: Stochastic depth rate.
        with_cp: Use activation checkpointing.
        stride_q: Stride of the block.
        **attention: Arguments of :class:`PoolingAttention`.
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
        super().__init__()
        self.with_cp = with_cp
        self.stride = stride_q
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PoolingAttention(dim, attn_dim, stride_q=stride_q, **attention)
        self.norm2 = nn.LayerNorm(attn_dim, eps=1e-6)
        self.mlp = Mlp(attn_dim, 4 * attn_dim, out_dim)
        # Shortcut projection for whichever half (attention or MLP) changes the width; never both do.
        self.shortcut_proj = None if dim == out_dim else nn.Linear(dim, out_dim)
        self.attn_widens, self.mlp_widens = attn_dim != dim, out_dim != attn_dim
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C'), H' and W' are H and W divided by ``stride_q``, rounded up."""

        def inner_forward(x: Tensor) -> Tensor:
            # The half that changes the width projects its normalized input for the shortcut.
            y = self.norm1(x)
            shortcut = self.shortcut_proj(y) if self.attn_widens else x
            if self.stride > 1:
                shortcut = max_pool(shortcut, self.stride)
            x = shortcut + self.drop_path(self.attn(y))
            y = self.norm2(x)
            shortcut = self.shortcut_proj(y) if self.mlp_widens else x
            return shortcut + self.drop_path(self.mlp(y))

        if self.with_cp and self.training:
            return checkpoint(inner_forward, x, use_reentrant=False)
        return inner_forward(x)


def max_pool(x: Tensor, stride: int) -> Tensor:
    """3 x 3 max pooling, (B, H, W, C) -> (B, H', W', C), H' and W' are H and W divided by ``stride``, rounded up."""
    height, width = x.shape[1:3]
    rows, cols = ceil_div(height, stride), ceil_div(width, stride)
    # `F.max_pool2d(x, 3, stride, padding=1)` with the padding written out: its own rounding of odd sizes would add a
    # guard to a compiled graph in every stage. A window of 3 needs stride * (rows - 1) + 3 rows, one of them on top.
    padding = (0, 0, 1, stride * (cols - 1) + 2 - width, 1, stride * (rows - 1) + 2 - height)
    x = F.pad(x, padding, value=-torch.inf).permute(0, 3, 1, 2)
    return F.max_pool2d(x, 3, stride).permute(0, 2, 3, 1)


@MODELS.register_module()
class MViTv2(Backbone):
    """Multiscale vision transformer, version 2 (https://arxiv.org/abs/2112.01526).

    Maps have strides 4, 8, 16 and 32. Each returned map is normalized by a LayerNorm of its own; the next stage reads
    the map before this norm. See :class:`.Backbone` for the arguments that all backbones share.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, ``'huge'``, or a dict of ``embed_dims`` and
            ``num_heads`` (of the first stage, doubled in each later one), ``num_layers`` (of all stages) and
            ``downscale_indices`` (the first block of each stage but the first).
        img_size: Side in pixels, or (H, W), for which relative positions are learned. Images of other sizes
            interpolate them.
        out_indices: Stages from 0 to 3 whose maps are returned.
        window_attention: Attend in windows of 56, 28, 14 and 7 tokens by stage: the detection form. The last block of
            stages 1, 2 and 3 is global; in stages 1 and 2 it has twice the stride of keys and values. False is the
            classification form: all blocks are global, which is slow for large images.
        dim_mul_in_attention: Double the channels in the attention of the first block of a stage instead of in the MLP
            of the block before. All published models do, except the large classifier trained on ImageNet-1k alone. If
            False, the maps of stages 0, 1 and 2 have the channels of the next stage.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1).
        frozen_stages: -1 trains everything, 0 freezes the patch embedding, k also the first k stages with their
            output norms.
        with_cp: Use activation checkpointing in training.
        init_cfg: Initialization config of MMEngine.
        pretrained: Path or address of a checkpoint, short for ``init_cfg``.
        in_channels: Channels of the images, see :class:`.Backbone`.

    Raises:
        ValueError: An argument is outside these ranges; the message says what is allowed.

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

    # A classifier has only the last norm.
    optional_keys = (r'norm0\..+', r'norm1\..+', r'norm2\..+')
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
        self._check_flags(window_attention=window_attention, dim_mul_in_attention=dim_mul_in_attention, with_cp=with_cp)
        img_size = self._check_size('img_size', img_size, least=32)
        dim, num_heads, num_layers = (self.arch[key] for key in ('embed_dims', 'num_heads', 'num_layers'))
        self.dim_mul_in_attention = dim_mul_in_attention
        shift = 0 if dim_mul_in_attention else 1  # then the MLP at the end of a stage has doubled the channels
        self.out_channels = tuple(dim * 2 ** min(stage + shift, NUM_STAGES - 1) for stage in range(NUM_STAGES))
        # First block of each stage, and the number of blocks.
        self.starts = (0, *self.arch['downscale_indices'], num_layers)
        self.patch_embed = OverlapPatchEmbed(in_channels, dim, 7, 4)
        self.blocks = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, num_layers)
        grid = tuple(ceil_div(side, 4) for side in img_size)  # (H, W) in tokens of the input of block i
        for i in range(self.starts[self.out_indices[-1] + 1]):
            stage = self._stage_of(i)
            downsample, is_last = i > 0 and i in self.starts, i + 1 in self.starts
            windowed = window_attention and not (is_last and stage > 0)
            stride_q = 2 if downsample else 1
            stride_kv = STRIDES_KV[stage]
            if window_attention and is_last and stage in (1, 2):  # global attention of the detection form
                stride_kv *= 2
            # A downsampling block partitions a map that still has the resolution of the stage before.
            window_size = WINDOW_SIZES[stage - 1 if downsample else stage] if windowed else 0
            attn_grid = (window_size, window_size) if windowed else grid
            if downsample:
                num_heads *= 2
            attn_dim = 2 * dim if downsample and dim_mul_in_attention else dim
            mlp_widens = not dim_mul_in_attention and is_last and stage + 1 < NUM_STAGES
            out_dim = 2 * attn_dim if mlp_widens else attn_dim
            block = PoolingBlock(
                dim,
                attn_dim,
                out_dim,
                drop_path=rates[i],
                with_cp=with_cp,
                num_heads=num_heads,
                stride_q=stride_q,
                stride_kv=stride_kv,
                window_size=window_size,
                # The tables cover the finer of the pooled queries and keys.
                input_size=tuple(ceil_div(side, min(stride_q, stride_kv)) for side in attn_grid),
            )
            # As the paper; an init_cfg for layers does not change parameters of other modules.
            trunc_normal_(block.attn.rel_pos_h, std=0.02)
            trunc_normal_(block.attn.rel_pos_w, std=0.02)
            self.blocks.append(block)
            dim = out_dim
            grid = tuple(ceil_div(side, stride_q) for side in grid)
        for stage in self.out_indices:
            setattr(self, f'norm{stage}', nn.LayerNorm(self.out_channels[stage], eps=1e-6))
        self.finish_init()

    def _stage_of(self, block: int) -> int:
        return sum(block >= start for start in self.starts[1:-1])

    def _check_arch(self) -> None:
        for key in ('embed_dims', 'num_layers', 'num_heads'):
            self._check_number(key, self.arch[key])
        if self.arch['embed_dims'] % self.arch['num_heads']:
            values = f'{self.arch["embed_dims"]} and {self.arch["num_heads"]}'
            self._fail(f'embed_dims is a multiple of num_heads, got {values}')
        blocks = range(1, self.arch['num_layers'])
        self._check_increasing('downscale_indices', self.arch['downscale_indices'], blocks, NUM_STAGES - 1)

    def check_compatible(self, result: Any) -> None:
        of_checkpoint = result.backbone_cfg.get('dim_mul_in_attention', True)
        if of_checkpoint != self.dim_mul_in_attention:
            raise ValueError(
                f'the checkpoint belongs to a model with dim_mul_in_attention={of_checkpoint}, '
                f'the model has dim_mul_in_attention={self.dim_mul_in_attention}'
            )

    def stages_to_freeze(self) -> List[List[Union[nn.Module, nn.Parameter]]]:
        stages = []
        for stage in range(self.out_indices[-1] + 1):
            norm = [getattr(self, f'norm{stage}')] if stage in self.out_indices else []
            stages.append([*self.blocks[self.starts[stage] : self.starts[stage + 1]], *norm])
        return [[self.patch_embed], *stages]

    def attention_layers(self) -> List[AttentionLayer]:
        layers, stride = [], 4
        for i, block in enumerate(self.blocks):
            attn = block.attn
            q_stride, k_stride = stride * attn.stride_q, stride * attn.stride_kv
            attn_type = 'window' if attn.window_size else 'global'
            window = attn.window_size * stride
            layers.append(AttentionLayer(i, self._stage_of(i), attn_type, attn, q_stride, k_stride, window))
            stride = q_stride
        return layers

    def stage_maps(self, x: Tensor) -> Iterator[Tuple[Tensor, Optional[Tensor]]]:
        x = self.patch_embed(x)
        for stage in range(self.out_indices[-1] + 1):
            for block in self.blocks[self.starts[stage] : self.starts[stage + 1]]:
                x = block(x)
            yield x, None

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        num_depths = self.arch['num_layers'] + 2
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        part, *rest = param_name[len(prefix) :].split('.')
        if part.startswith('norm'):
            return num_depths - 1, num_depths
        depth = 0 if part == 'patch_embed' else int(rest[0]) + 1
        return depth, num_depths

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Infers the config; the output norms of earlier stages are taken as a sign of ``window_attention``.

        No weight tells windows, and no metadata: the authors' detectors have windows and norms of all maps, their
        classifiers neither. ``window_attention`` is always among the assumed values.
        """
        starts = stage_starts(state_dict)
        arch = cls._infer_arch(state_dict, starts)
        num_layers = arch['num_layers']
        out_indices = tuple(stage for stage in range(NUM_STAGES) if f'norm{stage}.weight' in state_dict)
        window_attention = out_indices not in ((), (NUM_STAGES - 1,))
        cfg: Dict[str, Any] = dict(type=cls.__name__, arch=cls._match_arch(arch))
        cfg.update(cls.infer_in_channels(state_dict))
        if window_attention:
            cfg.update(window_attention=True, out_indices=out_indices)
        last = (starts[0] if starts else num_layers) - 1  # block of stage 0, whose MLP may double the channels
        dim = weight_shape(state_dict, f'blocks.{last}.norm2.weight', 1)[0]
        if weight_shape(state_dict, f'blocks.{last}.mlp.fc2.weight', 2)[0] != dim:
            cfg['dim_mul_in_attention'] = False
        size = infer_img_size(state_dict, starts, num_layers, window_attention)
        if size not in (None, (224, 224)):
            cfg['img_size'] = size[0] if size[0] == size[1] else size
        return cfg, dict(window_attention=window_attention)

    @staticmethod
    def _infer_arch(state_dict: Dict[str, Tensor], starts: List[int]) -> Dict[str, Any]:
        numbers = [int(match[1]) for match in (re.match(r'blocks\.([0-9]+)\.', key) for key in state_dict) if match]
        pool_shape = weight_shape(state_dict, 'blocks.0.attn.pool_q.weight', 4)
        proj_shape = weight_shape(state_dict, 'blocks.0.attn.proj.weight', 2)
        if proj_shape[0] % pool_shape[0]:
            raise ValueError(f'blocks.0.attn.pool_q and proj have weights of shapes {pool_shape} and {proj_shape}')
        return dict(
            embed_dims=weight_shape(state_dict, 'patch_embed.proj.weight', 4)[0],
            num_layers=1 + max(numbers, default=0),
            num_heads=proj_shape[0] // pool_shape[0],
            downscale_indices=tuple(starts),
        )

    @classmethod
    def _match_arch(cls, arch: Dict[str, Any]) -> Union[str, Dict[str, Any]]:
        """Returns the name of the published variant that begins with these blocks, or ``arch``."""
        ends = (*arch['downscale_indices'], arch['num_layers'])  # fewer if only early maps are returned
        for name, variant in cls.arch_zoo.items():
            variant_ends = (*variant['downscale_indices'], variant['num_layers'])[: len(ends)]
            if variant_ends == ends and all(variant[key] == arch[key] for key in ('embed_dims', 'num_heads')):
                return name
        if len(ends) < NUM_STAGES:
            raise ValueError(f'blocks.{arch["num_layers"]} is missing, and no published variant has these blocks')
        return arch


def infer_img_size(
    state_dict: Dict[str, Tensor], starts: List[int], num_layers: int, window_attention: bool
) -> Optional[Tuple[int, int]]:
    """Infers the image size from a global block's tables of relative positions; None if no block is global.

    A table of length L is for (L + 1) / 2 tokens of the finer of queries and keys.

    Args:
        state_dict: Weights of a backbone, without a prefix.
        starts: First block of each stage but the first.
        num_layers: Number of blocks.
        window_attention: Form of the model.
    """
    if not window_attention:
        block, stride = 0, 4  # queries of stride 4
    elif not starts:
        return None  # stage 0 alone attends in windows
    else:
        block, stride = num_layers - 1, 4 * 2 ** len(starts)  # the last block is global
        if block in starts and len(starts) == NUM_STAGES - 1:
            stride //= 2  # it also downsamples: its keys have the finer stride of stage 2
    lengths = [weight_shape(state_dict, f'blocks.{block}.attn.rel_pos_{axis}', 2)[0] for axis in 'hw']
    return tuple(stride * (length + 1) // 2 for length in lengths)


def stage_starts(state_dict: Dict[str, Tensor]) -> List[int]:
    """Returns the first block of each stage but the first: its attention is wider than the one before.

    Args:
        state_dict: Weights of a backbone, without a prefix.
    """
    widths: List[int] = []
    while f'blocks.{len(widths)}.attn.proj.weight' in state_dict:
        widths.append(weight_shape(state_dict, f'blocks.{len(widths)}.attn.proj.weight', 2)[0])
    return [block for block in range(1, len(widths)) if widths[block] > widths[block - 1]]
