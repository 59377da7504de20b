"""ViTAE in the ViTDet framework: plain transformers with convolutions in parallel to attention.

ViTAE: Xu et al., NeurIPS 2021, https://arxiv.org/abs/2106.03348
ViTAEv2: Zhang et al., IJCV 2023, https://arxiv.org/abs/2202.10108
ViTDet: Li et al., ECCV 2022, https://arxiv.org/abs/2203.16527

ViTAE-B is the backbone of ViTDet with a parallel convolution module (PCM) in every block. ViTAE-S has no patch
embedding and no absolute positions: three reduction cells of dilated convolutions and a linear attention reduce the
image to stride 16.
"""

import math
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import at_least_float32, pad_to_multiple
from .base import weight_shape
from .vit import Block, PlainViT
from .vit_weights import backbone_metadata, infer_plain_arch, infer_windows, nearest_grid

# torch.fx records calls of wrapped functions instead of tracing their branches.
torch.fx.wrap('pad_to_multiple')
torch.fx.wrap('performer_attention')

# Dilations, kernel size and stride of the three reduction cells.
REDUCTIONS = (((1, 2, 3, 4), 7, 4), ((1, 2, 3), 3, 2), ((1, 2), 3, 2))
# Channels of the convolutions in the first two cells.
CELL_CHANNELS = 64
# Channels per group of the parallel convolutions.
GROUP_CHANNELS = 4


class NormalCell(Block):
    """Transformer block with a parallel convolution module (PCM) that reads the input of the block.

    Args:
        dim: Channels, a multiple of 4.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the MLP, and of the first convolution of the module, divided by ``dim``.
        pcm_convs: Number of convolutions of the module, 2 or 3.
        norm_cfg: Norm config of the convolutions.
        **kwargs: Arguments of :class:`mmvitzoo.models.backbones.vit.Block`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, pcm_convs: int, norm_cfg: dict, **kwargs: Any):
        super().__init__(dim, num_heads, mlp_ratio, **kwargs)
        width = round(dim * mlp_ratio)
        conv = dict(kernel_size=3, padding=1, groups=dim // GROUP_CHANNELS)
        layers = [nn.Conv2d(dim, width, **conv), build_norm_layer(norm_cfg, width)[1], nn.SiLU()]
        layers += [nn.Conv2d(width, dim, **conv)]
        if pcm_convs == 3:
            layers += [build_norm_layer(norm_cfg, dim)[1], nn.SiLU(), nn.Conv2d(dim, dim, **conv), nn.SiLU()]
        self.pcm = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""

        def inner_forward(x: Tensor, local: Tensor) -> Tensor:
            x = x + self.drop_path(self.attn(self.norm1(x))) + self.drop_path(local)
            return x + self.drop_path(self.mlp(self.norm2(x)))

        # Not checkpointed: BatchNorm would count the batch twice.
        local = self.pcm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.with_cp and self.training:
            return checkpoint(inner_forward, x, local, use_reentrant=False)
        return inner_forward(x, local)


class PerformerAttention(nn.Module):
    """Attention by positive random features (https://arxiv.org/abs/2009.14794), linear in the number of tokens.

    Query i weights key j by ``f(q_i) . f(k_j)``, with ``f(x) = exp(W x - |x|^2 / 2) / sqrt(m)`` for m orthogonal rows
    of W.

    Args:
        in_dim: Channels of the tokens.
        dim: Channels inside and of the output.
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-5)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        num_features = dim // 2
        features = nn.init.orthogonal_(torch.empty(num_features, dim)) * math.sqrt(num_features)
        self.register_buffer('random_features', features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C'), the values added."""
        k, q, v = self.kqv(self.norm(x)).chunk(3, -1)
        return v + self.proj(performer_attention(q, k, v, self.random_features))


def performer_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Attention of (B, N, C) by random features w of (m, C), see :class:`PerformerAttention`."""

    def feature_map(x: Tensor) -> Tensor:
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(w))

    dtype = v.dtype
    # At least float32: exponentials of squares leave the range of half precision.
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, w = (at_least_float32(x) for x in (q, k, v, w))
        q, k = feature_map(q), feature_map(k)  # (B, N, m)
        context = k.transpose(1, 2) @ v  # (B, m, C)
        total = q @ k.sum(1)[..., None]  # (B, N, 1)
        return (q @ context / (total + 1e-8)).to(dtype)


class ReductionCell(nn.Module):
    """Pyramid of parallel dilated convolutions (PRM), in all but the last cell with attention and a PCM.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        dilations: Dilations of the parallel convolutions.
        kernel_size: Kernel size of these convolutions.
        stride: Stride of the cell.
        attention: Add attention over the pyramid and a parallel convolution module; otherwise the pyramid is returned.
        norm_cfg: Norm config of the convolution module.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        dilations: Sequence[int],
        kernel_size: int,
        stride: int,
        attention: bool,
        norm_cfg: dict,
    ):
        super().__init__()
        width = CELL_CHANNELS if attention else dim // len(dilations)
        self.prm = nn.ModuleList(
            nn.Conv2d(
                in_dim,
                width,
                kernel_size,
                stride,
                padding=math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2),
                dilation=dilation,
            )
            for dilation in dilations
        )
        self.attention = attention
        if attention:
            self.attn = PerformerAttention(width * len(dilations), dim)
            self.norm = nn.LayerNorm(dim, eps=1e-5)
            self.mlp = Mlp(dim, dim)
            self.pcm = nn.Sequential(
                nn.Conv2d(in_dim, width, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, stride=stride // 2, padding=1),
                build_norm_layer(norm_cfg, width)[1],
                nn.SiLU(),
                nn.Conv2d(width, dim, 3, padding=1),
                nn.SiLU(),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        tokens = torch.cat([F.gelu(conv(x)) for conv in self.prm], 1)
        if not self.attention:
            return tokens
        size = tokens.shape[2:]
        y = self.attn(tokens.flatten(2).transpose(1, 2)) + self.pcm(x).flatten(2).transpose(1, 2)
        y = y + self.mlp(self.norm(y))
        return y.transpose(1, 2).unflatten(2, size)


class ReductionStem(nn.Sequential):
    """Three reduction cells in place of a patch embedding.

    Images that 16 does not divide are padded with zeros at the bottom and on the right.

    Args:
        in_channels: Channels of the image.
        dims: Channels after each cell.
        norm_cfg: Norm config of the convolution modules.
    """

    def __init__(self, in_channels: int, dims: Sequence[int], norm_cfg: dict):
        super().__init__(
            ReductionCell(in_channels, dims[0], *REDUCTIONS[0], attention=True, norm_cfg=norm_cfg),
            ReductionCell(dims[0], dims[1], *REDUCTIONS[1], attention=True, norm_cfg=norm_cfg),
            ReductionCell(dims[1], dims[2], *REDUCTIONS[2], attention=False, norm_cfg=norm_cfg),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H', W', C'), H' and W' are H and W divided by 16, rounded up."""
        x = pad_to_multiple(x, 16, channels_first=True)
        return super().forward(x).permute(0, 2, 3, 1).contiguous()


@MODELS.register_module()
class ViTAE(PlainViT):
    """ViTAE (https://arxiv.org/abs/2106.03348) as a backbone of ViTDet (https://arxiv.org/abs/2203.16527).

    Every map has stride 16 and ``embed_dims`` channels. Relative positions follow the authors' ViTDet repository and
    start from zero, as there. The last map is normalized. See :class:`.Backbone` for the arguments that all backbones
    share.

    Args:
        arch: ``'base'``, ``'small'``, or a dict of ``embed_dims`` (a multiple of 4), ``num_layers``, ``num_heads``,
            ``mlp_ratio``, ``global_attn_indexes``, ``pcm_convs`` (2 or 3 convolutions in parallel to attention) and
            ``reduction_dims`` (widths after the first two reduction cells, or None for a patch embedding).
        img_size: Side in pixels, or (H, W), for which positions are learned. Images of other sizes interpolate them.
        out_indices: Blocks whose maps are returned; None is the last.
        final_norm: Normalize the output of the very last block.
        window_size: Side of the attention windows in tokens.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1).
        norm_cfg: Norm config of the convolutions, for :func:`mmcv.cnn.build_norm_layer`.
        frozen_stages: -1 trains everything, 0 freezes everything before the blocks, k also the first k blocks, and
            with the last block the last norm.
        norm_eval: Keep every BatchNorm in eval mode during training.
        with_cp: Use activation checkpointing in training, but not for the convolutions.
        init_cfg: Initialization config of MMEngine.
        pretrained: Path or address of a checkpoint, short for ``init_cfg``.
        in_channels: Channels of the images, see :class:`.Backbone`.

    Raises:
        ValueError: An argument is outside these ranges; the message says what is allowed.

    Examples:
        >>> import torch
        >>> from mmvitzoo.models import ViTAE
        >>> model = ViTAE('small').eval()
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 384, 4, 6)]
    """

    family = 'vitae'
    arch_zoo: Dict[str, Dict[str, Any]] = {
        'base': dict(
            embed_dims=768,
            num_layers=12,
            num_heads=12,
            mlp_ratio=4,
            global_attn_indexes=(2, 5, 8, 11),
            pcm_convs=2,
            reduction_dims=None,
        ),
        'small': dict(
            embed_dims=384,
            num_layers=14,
            num_heads=6,
            mlp_ratio=3,
            global_attn_indexes=(2, 5, 8, 13),
            pcm_convs=3,
            reduction_dims=(96, 192),
        ),
    }
    # The reduction cells read the image in several convolutions.
    first_convs = (
        'patch_embed.proj',
        *(f'patch_embed.0.prm.{i}' for i in range(len(REDUCTIONS[0][0]))),
        'patch_embed.0.pcm.0',
    )

    def __init__(
        self,
        arch: Union[str, Dict[str, Any]] = 'base',
        img_size: Union[int, Sequence[int]] = 1024,
        out_indices: Optional[Sequence[int]] = None,
        final_norm: bool = True,
        window_size: int = 14,
        drop_path_rate: float = 0.0,
        norm_cfg: dict = dict(type='BN'),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
        pretrained: Optional[str] = None,
        in_channels: int = 3,
    ):
        arch = self._resolve_arch(arch)
        self._check_norm_cfg(norm_cfg)
        self.norm_cfg = norm_cfg  # before the constructor of PlainViT, which builds stem and blocks
        super().__init__(
            arch,
            img_size=img_size,
            out_indices=out_indices,
            final_norm=final_norm,
            with_cls_token=False,
            window_size=window_size,
            global_attn_indexes=arch['global_attn_indexes'],
            use_rel_pos=True,
            rel_pos_scaled=True,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
            pretrained=pretrained,
            in_channels=in_channels,
        )
        self.norm_eval = norm_eval
        self.freeze()

    def _check_arch(self, arch: Dict[str, Any]) -> None:
        super()._check_arch(arch)
        dim, ratio, dims = arch['embed_dims'], arch['mlp_ratio'], arch['reduction_dims']
        if dim % GROUP_CHANNELS:
            self._fail(f'embed_dims is a multiple of {GROUP_CHANNELS}, got {dim}')
        if arch['pcm_convs'] not in (2, 3):
            self._fail(f'pcm_convs is 2 or 3, got {arch["pcm_convs"]!r}')
        if round(dim * ratio) % (dim // GROUP_CHANNELS):
            self._fail(f'embed_dims * mlp_ratio is a multiple of embed_dims / {GROUP_CHANNELS}, got {dim} and {ratio}')
        if dims is not None and not (
            isinstance(dims, Sequence) and len(dims) == 2 and all(isinstance(x, int) and x > 1 for x in dims)
        ):
            self._fail(f'reduction_dims is None or two numbers of at least 2, got {dims!r}')

    def _build_stem(self, patch_size: int) -> None:
        if self.arch['reduction_dims'] is None:
            super()._build_stem(patch_size)
        else:
            dims = (*self.arch['reduction_dims'], self.arch['embed_dims'])
            self.patch_embed = ReductionStem(self.in_channels, dims, self.norm_cfg)
            self.pos_embed = self.cls_token = None
            self.overlapping_patches = True

    def _pos_embed(self, x: Tensor) -> Tensor:
        return x if self.pos_embed is None else super()._pos_embed(x)

    def _build_block(self, residual: bool, **kwargs: Any) -> nn.Module:
        names = ('embed_dims', 'num_heads', 'mlp_ratio', 'pcm_convs')
        return NormalCell(*(self.arch[name] for name in names), self.norm_cfg, **kwargs)

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Infers the config; relative positions of one size in every block do not tell which blocks are global."""
        metadata = backbone_metadata(state_dict) or {}
        arch, assumed = infer_plain_arch(state_dict, cls.arch_zoo, metadata.get('num_heads'))
        arch['pcm_convs'] = 3 if 'blocks.0.pcm.6.weight' in state_dict else 2
        has_cells = 'patch_embed.0.prm.0.weight' in state_dict
        arch['reduction_dims'] = (
            tuple(weight_shape(state_dict, f'patch_embed.{stage}.norm.weight', 1)[0] for stage in (0, 1))
            if has_cells
            else None
        )
        name = next((name for name, variant in cls.arch_zoo.items() if {**variant, **arch} == variant), None)
        cfg = dict(type=cls.__name__, arch=name, final_norm='norm.weight' in state_dict)
        cfg.update(cls.infer_in_channels(state_dict))
        grid = None if has_cells else nearest_grid(weight_shape(state_dict, 'pos_embed', 3)[1])
        is_assumed_grid = grid is not None and grid[0] != grid[1]
        window_size, global_blocks, global_grid, is_told = infer_windows(state_dict, arch['num_layers'], metadata)
        if 'blocks.0.attn.rel_pos_h' in state_dict:
            cfg['window_size'] = window_size
        else:
            is_told = 'window_size' in metadata
        if global_grid:
            grid, is_assumed_grid = global_grid, False
        if name is None or (is_told and cls.arch_zoo[name]['global_attn_indexes'] != global_blocks):
            cfg['arch'] = dict(arch, global_attn_indexes=global_blocks)
        elif not is_told:
            global_blocks = cls.arch_zoo[name]['global_attn_indexes']
        if not is_told:
            assumed['global_attn_indexes'] = global_blocks
        if grid:
            cfg['img_size'] = tuple(16 * side for side in grid)
        if is_assumed_grid:
            assumed['img_size'] = cfg['img_size']
        return cfg, assumed
