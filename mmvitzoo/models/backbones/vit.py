"""Plain vision transformers, for classification, segmentation and ViTDet.

ViT: Dosovitskiy et al., ICLR 2021, https://arxiv.org/abs/2010.11929
ViTDet: Li et al., ECCV 2022, https://arxiv.org/abs/2203.16527

All blocks have one stride and one width. For segmentation and classification, every block attends globally. ViTDet
attends in windows, adds decomposed relative positions, and propagates information across windows in a few blocks,
by global attention or by a residual convolution.

Maps are (B, H, W, C) between blocks. With a class token, tokens are (B, 1 + H * W, C).
"""

import math
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import Attention, LayerNorm2d, PatchEmbed, init_linear_weights, resize_pos_embed
from ..layers.padding import ceil_div
from .base import AttentionLayer, Backbone, count_weights, drop_path_rates, weight_shape


class ResidualConv(nn.Sequential):
    """Residual bottleneck that propagates information across windows in ViTDet, initialized to the identity.

    Args:
        dim: Channels, an even number.
    """

    def __init__(self, dim: int):
        super().__init__(
            nn.Conv2d(dim, dim // 2, 1, bias=False),
            LayerNorm2d(dim // 2, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim // 2, 3, padding=1, bias=False),
            LayerNorm2d(dim // 2, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 1, bias=False),
            LayerNorm2d(dim, eps=1e-6),
        )
        nn.init.zeros_(self[-1].weight)  # zero output: the residual sum starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return x + super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block of ViT and ViTDet.

    Args:
        dim: Channels.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the MLP divided by ``dim``.
        drop_path: Stochastic depth rate.
        residual: Add a residual convolution at the end.
        with_cp: Use activation checkpointing.
        **attention: Arguments of :class:`mmvitzoo.models.layers.Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        residual: bool = False,
        with_cp: bool = False,
        **attention: Any,
    ):
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, **attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.residual = ResidualConv(dim) if residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), or (B, N, C) -> (B, N, C) with plain attention."""

        def inner_forward(x: Tensor) -> Tensor:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            x = x + self.drop_path(self.mlp(self.norm2(x)))
            return self.residual(x)

        if self.with_cp and self.training:
            return checkpoint(inner_forward, x, use_reentrant=False)
        return inner_forward(x)


@MODELS.register_module()
class PlainViT(Backbone):
    """Plain vision transformer (https://arxiv.org/abs/2010.11929), also as in ViTDet (https://arxiv.org/abs/2203.16527).

    Parameters have timm's names. Every map has stride ``patch_size`` and ``embed_dims`` channels. See
    :class:`.Backbone` for the arguments that all backbones share.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, ``'huge'``, or a dict of ``embed_dims``,
            ``num_layers``, ``num_heads`` and ``mlp_ratio``.
        img_size: Side in pixels, or (H, W), for which positions are learned. Images of other sizes interpolate them.
        pretrain_img_size: Side in pixels, or (H, W), of the absolute positions, if it differs from that of the relative
            ones. ViTDet keeps the absolute positions of the classifier that it starts from.
        patch_size: Side of a patch in pixels.
        out_indices: Blocks whose maps are returned; None is the last.
        out_type: ``'featmap'`` returns maps, ``'cls_token'`` class tokens of (B, C) for MMPretrain's linear head.
        final_norm: Normalize the output of the very last block.
        with_cls_token: Use a class token.
        window_size: Side of the attention windows in tokens; 0 is global attention.
        global_attn_indexes: Blocks with global attention where ``window_size`` is set.
        residual_block_indexes: Blocks that end in a residual convolution.
        use_rel_pos: Add decomposed relative positions in every block.
        rel_pos_std: Standard deviation of the initial relative positions. Published models start from 0; a small
            model without pretraining learns sooner from 0.5.
        rel_pos_scaled: Multiply the tables by the scaled query, see :class:`.Attention`. The converter folds the scale
            into the tables, so converted weights need False. True is only for weights that were trained here with it.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1).
        frozen_stages: -1 trains everything, 0 freezes the patch embedding and positions, k also the first k blocks,
            and with the last block the last norm.
        with_cp: Use activation checkpointing in training.
        init_cfg: Initialization config of MMEngine.

    Raises:
        ValueError: An argument is outside these ranges; the message says what is allowed.

    Examples:
        >>> import torch
        >>> from mmvitzoo.models import PlainViT
        >>> model = PlainViT('tiny', out_indices=(5, 11)).eval()
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 192, 4, 6), (1, 192, 4, 6)]
    """

    family = 'plainvit'
    arch_zoo: Dict[str, Dict[str, Any]] = {
        'tiny': dict(embed_dims=192, num_layers=12, num_heads=3, mlp_ratio=4),
        'small': dict(embed_dims=384, num_layers=12, num_heads=6, mlp_ratio=4),
        'base': dict(embed_dims=768, num_layers=12, num_heads=12, mlp_ratio=4),
        'large': dict(embed_dims=1024, num_layers=24, num_heads=16, mlp_ratio=4),
        'huge': dict(embed_dims=1280, num_layers=32, num_heads=16, mlp_ratio=4),
    }

    overlapping_patches = False
    may_lack = (r'blocks\.\d+\.attn\.rel_pos_[hw]', r'blocks\.\d+\.residual\..+')
    init_module = staticmethod(init_linear_weights)

    def __init__(
        self,
        arch: Union[str, Dict[str, Any]] = 'base',
        img_size: Union[int, Sequence[int]] = 224,
        pretrain_img_size: Union[int, Sequence[int], None] = None,
        patch_size: int = 16,
        out_indices: Optional[Sequence[int]] = None,
        out_type: str = 'featmap',
        final_norm: bool = True,
        with_cls_token: bool = True,
        window_size: int = 0,
        global_attn_indexes: Sequence[int] = (),
        residual_block_indexes: Sequence[int] = (),
        use_rel_pos: bool = False,
        rel_pos_std: float = 0.0,
        rel_pos_scaled: bool = False,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
    ):
        arch = self._resolve_arch(arch)  # also here, for the default of out_indices
        self._check_arch(arch)
        num_layers, dim = arch['num_layers'], arch['embed_dims']
        out_indices = (num_layers - 1,) if out_indices is None else out_indices
        super().__init__(arch, num_layers, out_indices, drop_path_rate, frozen_stages, init_cfg=init_cfg)
        if out_type not in ('featmap', 'cls_token'):
            self._fail(f"out_type is 'featmap' or 'cls_token', got {out_type!r}")
        if out_type == 'cls_token' and not with_cls_token:
            self._fail("out_type='cls_token' needs with_cls_token=True")
        if with_cls_token and (window_size or use_rel_pos or residual_block_indexes):
            self._fail(
                'window_size, use_rel_pos and residual_block_indexes need with_cls_token=False: '
                'a class token has no position on the map'
            )
        self._check_number('patch_size', patch_size)
        self._check_number('window_size', window_size, least=0)
        for name, indexes in (
            ('global_attn_indexes', global_attn_indexes),
            ('residual_block_indexes', residual_block_indexes),
        ):
            if not isinstance(indexes, Sequence) or not set(indexes) <= set(range(num_layers)):
                self._fail(f'{name} are blocks from 0 to {num_layers - 1}, got {indexes!r}')
        if global_attn_indexes and not window_size:
            self._fail('global_attn_indexes without window_size, where every block is global')
        img_size = self._check_size('img_size', img_size)
        pretrain_img_size = self._check_size('pretrain_img_size', pretrain_img_size or img_size)

        self.out_type = out_type
        self.rel_pos_scaled = rel_pos_scaled
        self.with_cls_token = with_cls_token
        self.out_channels = (dim,) * num_layers
        self.strides = (patch_size,) * num_layers
        rel_pos_grid = tuple(ceil_div(side, patch_size) for side in img_size)
        self.pos_embed_grid = tuple(ceil_div(side, patch_size) for side in pretrain_img_size)
        self._build_stem(patch_size)
        self.blocks = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, num_layers)
        for i in range(self.out_indices[-1] + 1):
            window = 0 if i in global_attn_indexes else window_size
            input_size = (window, window) if window else rel_pos_grid
            block = self._build_block(
                drop_path=rates[i],
                residual=i in residual_block_indexes,
                with_cp=with_cp,
                window_size=window,
                input_size=input_size if use_rel_pos else None,
                rel_pos_scaled=rel_pos_scaled,
            )
            if use_rel_pos and rel_pos_std:
                trunc_normal_(block.attn.rel_pos_h, std=rel_pos_std)
                trunc_normal_(block.attn.rel_pos_w, std=rel_pos_std)
            self.blocks.append(block)
        has_norm = final_norm and len(self.blocks) == num_layers
        self.norm = nn.LayerNorm(dim, eps=1e-6) if has_norm else nn.Identity()
        self.freeze()

    def _check_arch(self, arch: Dict[str, Any]) -> None:
        for key in ('embed_dims', 'num_layers', 'num_heads'):
            self._check_number(key, arch[key])
        if not isinstance(arch['mlp_ratio'], (int, float)) or arch['mlp_ratio'] <= 0:
            self._fail(f'mlp_ratio is a positive number, got {arch["mlp_ratio"]!r}')
        if arch['embed_dims'] % arch['num_heads']:
            self._fail(f'embed_dims is a multiple of num_heads, got {arch["embed_dims"]} and {arch["num_heads"]}')

    def _build_stem(self, patch_size: int) -> None:
        dim = self.arch['embed_dims']
        self.patch_embed = PatchEmbed(3, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if self.with_cls_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.with_cls_token + math.prod(self.pos_embed_grid), dim))
        trunc_normal_(self.pos_embed, std=0.02)
        if self.with_cls_token:
            trunc_normal_(self.cls_token, std=0.02)

    def _build_block(self, **kwargs: Any) -> nn.Module:
        return Block(self.arch['embed_dims'], self.arch['num_heads'], self.arch['mlp_ratio'], **kwargs)

    def check_conversion(self, result: Any) -> None:
        foreign = result.family == 'plainvit' and result.source != 'mmvitzoo'
        if self.rel_pos_scaled and foreign and any('rel_pos' in key for key in result.backbone):
            raise ValueError(
                f'relative positions of the {result.source} layout are converted for rel_pos_scaled=False, '
                'the model has rel_pos_scaled=True'
            )

    def stages_to_freeze(self) -> List[List[Union[nn.Module, nn.Parameter]]]:
        stem = [x for x in (self.patch_embed, self.pos_embed, self.cls_token) if x is not None]
        stages = [[block] for block in self.blocks]
        stages[-1].append(self.norm)
        return [stem, *stages]

    def attention_layers(self) -> List[AttentionLayer]:
        layers = []
        for i, block in enumerate(self.blocks):
            stride, window = self.strides[0], block.attn.window_size
            attn_type = 'window' if window else 'global'
            layers.append(
                AttentionLayer(
                    i,
                    4 * i // len(self.blocks),
                    attn_type,
                    block.attn,
                    stride,
                    stride,
                    window * stride,
                    int(self.with_cls_token),
                )
            )
        return layers

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Adds positions and the class token: (B, H, W, C) -> (B, H, W, C), or (B, 1 + H * W, C) with the token."""
        pos_embed = resize_pos_embed(self.pos_embed[:, int(self.with_cls_token) :], self.pos_embed_grid, x.shape[1:3])
        x = x + pos_embed
        if not self.with_cls_token:
            return x
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Computes the maps, or class tokens, of the blocks in ``out_indices``.

        Args:
            x: Images, (B, 3, H, W), H and W of at least 32 pixels.

        Returns:
            For each index a contiguous map of (B, ``embed_dims``, H', W'); H' and W' are H and W divided by
            ``patch_size``, rounded up. With ``out_type='cls_token'`` the token, (B, ``embed_dims``).

        Raises:
            ValueError: ``x`` has another shape.
        """
        self.check_input(x)
        x = self.patch_embed(x)  # (B, H', W', C)
        size = x.shape[1:3]
        x = self._pos_embed(x)  # (B, H', W', C), or (B, 1 + H' * W', C) with a class token
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.out_indices:
                out = self.norm(x) if i == self.arch['num_layers'] - 1 else x
                if self.out_type == 'cls_token':
                    outs.append(out[:, 0])
                    continue
                if self.with_cls_token:
                    out = out[:, 1:].unflatten(1, size)
                outs.append(out.permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        # Residual convolutions, which no classifier has, belong to the last depth.
        num_depths = self.arch['num_layers'] + 2
        part, *rest = param_name[len(prefix) :].split('.')
        if not param_name.startswith(prefix) or part == 'norm' or 'residual' in rest:
            return num_depths - 1, num_depths
        return int(rest[0]) + 1 if part == 'blocks' else 0, num_depths

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Infers the config.

        Assumes, where nothing tells, the number of heads (see :func:`infer_plain_arch`), windows of 14 x 14 tokens
        beside residual convolutions, and the grid nearest to a square for positions.
        """
        arch, assumed = infer_plain_arch(state_dict, cls.arch_zoo)
        with_cls_token = 'cls_token' in state_dict
        cfg = dict(
            type=cls.__name__,
            arch=next((name for name, variant in cls.arch_zoo.items() if variant == arch), arch),
            with_cls_token=with_cls_token,
            final_norm='norm.weight' in state_dict,
        )
        residual = [block for block in range(arch['num_layers']) if f'blocks.{block}.residual.0.weight' in state_dict]
        if residual:
            cfg['residual_block_indexes'] = residual
        img_grid = None
        if 'blocks.0.attn.rel_pos_h' in state_dict:
            cfg['use_rel_pos'] = True
            window_size, global_blocks, img_grid = infer_attention_areas(
                state_dict, arch['num_layers'], evenly=not residual
            )
            cfg['window_size'] = window_size
            if img_grid in (None, (window_size, window_size)):  # all tables have one size
                assumed.update(window_size=window_size, global_attn_indexes=global_blocks)
            if global_blocks:
                cfg['global_attn_indexes'] = global_blocks
        elif residual:
            cfg['window_size'] = assumed['window_size'] = 14

        num_patches = weight_shape(state_dict, 'pos_embed', 3)[1] - with_cls_token
        patch_size = weight_shape(state_dict, 'patch_embed.proj.weight', 4)[-1]
        same_grid = img_grid is not None and math.prod(img_grid) == num_patches
        grid = img_grid if same_grid else nearest_grid(num_patches)
        img_grid = img_grid or grid
        cfg['img_size'] = _pixels(img_grid, patch_size)
        if grid != img_grid:
            cfg['pretrain_img_size'] = _pixels(grid, patch_size)
        if grid[0] != grid[1] and not same_grid:
            name = 'img_size' if grid == img_grid else 'pretrain_img_size'
            assumed[name] = cfg[name]
        if patch_size != 16:
            cfg['patch_size'] = patch_size
        return cfg, assumed

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Resizes positions of another square grid, and drops a class token that the model does not have."""
        if self.pos_embed is not None:  # None in ViTAE-S
            if self.cls_token is None and state_dict.pop(f'{prefix}cls_token', None) is not None:
                print_log(f'{self._get_name()}: dropped the class token of the checkpoint', logger='current')
            loaded: Optional[Tensor] = state_dict.get(f'{prefix}pos_embed')
            if loaded is not None and loaded.dim() == 3 and loaded.shape[1] != self.pos_embed.shape[1]:
                side = math.isqrt(loaded.shape[1])
                num_prefix = loaded.shape[1] - side**2  # 1 with the position of a class token
                if num_prefix in (0, 1) and num_prefix >= self.with_cls_token:
                    pos_embed = resize_pos_embed(loaded[:, num_prefix:], (side, side), self.pos_embed_grid).flatten(
                        1, 2
                    )
                    pos_embed = torch.cat([loaded[:, : int(self.with_cls_token)], pos_embed], 1)
                    state_dict[f'{prefix}pos_embed'] = pos_embed
                    if (side, side) != self.pos_embed_grid:
                        grids = f'{side} x {side} to {self.pos_embed_grid[0]} x {self.pos_embed_grid[1]}'
                        print_log(f'{self._get_name()}: resized positions from {grids}', logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args)


def infer_plain_arch(
    state_dict: Dict[str, Tensor], arch_zoo: Dict[str, Dict[str, Any]]
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Infers width, depth, heads and MLP ratio of plain blocks, and returns the assumed ones a second time.

    Relative positions tell the number of heads. Without them, it is assumed to be that of a published variant, or the
    one with heads of 64 channels or a little more.
    """
    num_layers = count_weights(state_dict, 'blocks.{}.norm1.weight')
    hidden_dim, dim = weight_shape(state_dict, 'blocks.0.mlp.fc1.weight', 2)
    mlp_ratio = hidden_dim / dim
    assumed = {}
    if 'blocks.0.attn.rel_pos_h' in state_dict:
        head_dim = weight_shape(state_dict, 'blocks.0.attn.rel_pos_h', 2)[1]
        if dim % head_dim:
            raise ValueError(f'blocks.0.attn.rel_pos_h has {head_dim} channels, which do not divide {dim}')
        num_heads = dim // head_dim
    else:
        known = dict(embed_dims=dim, num_layers=num_layers, mlp_ratio=mlp_ratio)
        published = (variant['num_heads'] for variant in arch_zoo.values() if {**variant, **known} == variant)
        nearest = next(n for n in range(max(dim // 64, 1), 0, -1) if dim % n == 0)
        num_heads = assumed['num_heads'] = next(published, nearest)
    return dict(embed_dims=dim, num_layers=num_layers, num_heads=num_heads, mlp_ratio=mlp_ratio), assumed


def infer_attention_areas(
    state_dict: Dict[str, Tensor], num_layers: int, evenly: bool
) -> Tuple[int, Tuple[int, ...], Optional[Tuple[int, int]]]:
    """Infers from relative positions where blocks attend: most in windows, the others to the whole image.

    Args:
        state_dict: Weights of a backbone, without a prefix.
        num_layers: Number of blocks.
        evenly: Assume four evenly spaced global blocks if the tables of all blocks have one size.

    Returns:
        Side of the windows in tokens, the global blocks, and the grid (H, W) of their tables: that of a window if the
        blocks were assumed, None if there are none.
    """
    lengths = [
        tuple(weight_shape(state_dict, f'blocks.{block}.attn.rel_pos_{axis}', 2)[0] for axis in 'hw')
        for block in range(num_layers)
    ]
    length = Counter(lengths).most_common(1)[0][0][0]
    global_blocks = tuple(block for block in range(num_layers) if lengths[block] != (length, length))
    if not global_blocks and evenly and num_layers >= 4:
        global_blocks = tuple((i + 1) * num_layers // 4 - 1 for i in range(4))
    grid = tuple((x + 1) // 2 for x in lengths[global_blocks[0]]) if global_blocks else None
    return (length + 1) // 2, global_blocks, grid


def nearest_grid(num_patches: int) -> Tuple[int, int]:
    """Returns rows and columns of the grid nearest to a square, at least as wide as high."""
    if num_patches < 1:
        raise ValueError('pos_embed has no position of a patch')
    rows = next(rows for rows in range(math.isqrt(num_patches), 0, -1) if num_patches % rows == 0)
    return rows, num_patches // rows


def _pixels(grid: Tuple[int, int], patch_size: int) -> Union[int, Tuple[int, int]]:
    height, width = (side * patch_size for side in grid)
    return height if height == width else (height, width)
