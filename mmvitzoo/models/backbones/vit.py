"""Plain vision transformers, for classification, segmentation and ViTDet.

ViT: Dosovitskiy et al., ICLR 2021, https://arxiv.org/abs/2010.11929
ViTDet: Li et al., ECCV 2022, https://arxiv.org/abs/2203.16527

One stride and one width from the first block to the last. In segmentation and classification every
block attends to the whole image. ViTDet attends in windows, adds decomposed relative positions,
and lets information cross windows in a few blocks, which attend to the whole image or end in a
residual convolution.

Maps are (B, H, W, C) between blocks; with a class token, which has no place on a map, sequences of
(B, 1 + H * W, C).
"""

import math
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from mmengine.registry import MODELS
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ...checkpoints import Converted
from ..layers import Attention, Block, LayerNorm2d, PatchEmbedding, init_linear_weights
from .base import Backbone, count_weights, weight_shape


class ResidualConv(nn.Sequential):
    """Bottleneck that carries information across windows, of ViTDet; initialised to change nothing.

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
        nn.init.zeros_(self[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), the sum included."""
        return x + super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PlainBlock(Block):
    """Transformer block over a map, in windows or whole, or over a sequence.

    Args:
        dim: Channels.
        num_heads: Heads.
        mlp_ratio: Width of the MLP over ``dim``.
        drop_path: Rate of stochastic depth.
        residual: End in a residual convolution.
        with_cp: Recompute the block in the backward pass.
        **attention: See :class:`mmvitzoo.models.layers.Attention`.
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
        super().__init__(dim, Attention(dim, num_heads, **attention), mlp_ratio, drop_path, with_cp)
        self.residual = ResidualConv(dim) if residual else nn.Identity()

    def transform(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), or (B, N, C) -> (B, N, C) with plain attention."""
        return self.residual(super().transform(x))


@MODELS.register_module()
class PlainViT(Backbone):
    """Plain vision transformer (https://arxiv.org/abs/2010.11929) and ViTDet's (https://arxiv.org/abs/2203.16527).

    Every map has stride ``patch_size`` and ``embed_dims`` channels.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, ``'huge'``, or a dict of
            ``embed_dims``, ``num_layers``, ``num_heads`` and ``mlp_ratio``.
        img_size: Pixels a side, or (H, W), for which positions are learned. Images of any other
            size interpolate them.
        pretrain_img_size: The same for the absolute positions alone, if it is another than for
            the relative ones; ViTDet keeps those of the classifier that it starts from.
        patch_size: Side of a patch, in pixels.
        out_indices: Blocks, from 0 on and in rising order, whose maps are returned; None is the
            last. Blocks after the last one are not built.
        out_type: ``'featmap'`` returns maps, ``'cls_token'`` class tokens of (B, C) for
            MMPretrain's linear head.
        final_norm: Normalise what the very last block returns.
        with_cls_token: Let a class token take part in attention.
        window_size: Side of the attention windows in tokens; 0 attends to the whole image.
        global_attn_indexes: Blocks that attend to the whole image nonetheless.
        residual_block_indexes: Blocks that end in a residual convolution.
        use_rel_pos: Add decomposed relative positions in every block.
        rel_pos_std: Standard deviation of their initial tables. Published models start from zeros; a
            small model without pretraining learns sooner from 0.5.
        rel_pos_scaled: See :class:`mmvitzoo.models.layers.Attention`. Converted weights of every
            source need False: the scale is taken into the tables where it was outside.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        frozen_stages: -1 trains everything, 0 freezes the patch embedding and positions, k them
            and the first k blocks.
        with_cp: Recompute blocks in the backward pass to save memory.
        init_cfg: MMEngine's initialisation. ``dict(type='Pretrained', checkpoint=PATH_OR_URL)``
            takes files of timm, DeiT, MAE, Detectron2, Hugging Face, MMPretrain and others.

    Raises:
        ValueError: An argument outside these ranges; the message says what is allowed.

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
        arch = self._resolve_arch(arch)
        self._check_arch(arch)
        num_layers = arch['num_layers']
        out_indices = (num_layers - 1,) if out_indices is None else out_indices
        super().__init__(arch, num_layers, out_indices, drop_path_rate, frozen_stages, init_cfg=init_cfg)
        name = self._get_name()
        if out_type not in ('featmap', 'cls_token'):
            raise ValueError(f"{name}: out_type is 'featmap' or 'cls_token', got {out_type!r}")
        if out_type == 'cls_token' and not with_cls_token:
            raise ValueError(f"{name}: out_type='cls_token' needs with_cls_token=True")
        if with_cls_token and (window_size or use_rel_pos or residual_block_indexes):
            raise ValueError(
                f'{name}: a class token has no place on a map; window_size, use_rel_pos and '
                'residual_block_indexes need with_cls_token=False'
            )
        for argument, value, least in (('patch_size', patch_size, 1), ('window_size', window_size, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f'{name}: {argument} is a number of at least {least}, got {value!r}')
        for argument, blocks in (
            ('global_attn_indexes', global_attn_indexes),
            ('residual_block_indexes', residual_block_indexes),
        ):
            if not isinstance(blocks, Sequence) or not set(blocks) <= set(range(num_layers)):
                raise ValueError(f'{name}: {argument} are blocks from 0 to {num_layers - 1}, got {blocks!r}')
        if global_attn_indexes and not window_size:
            raise ValueError(f'{name}: global_attn_indexes without window_size, where every block is global')

        self.out_type = out_type
        self.rel_pos_scaled = rel_pos_scaled
        self.with_cls_token = with_cls_token
        self.out_channels = (arch['embed_dims'],) * num_layers
        grid = self._grid('img_size', img_size, patch_size)
        pretrain_grid = self._grid('pretrain_img_size', pretrain_img_size or img_size, patch_size)
        self.stem = self._build_stem(patch_size, pretrain_grid)
        self.blocks = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            window = 0 if i in global_attn_indexes else window_size
            rel_pos_size = (window, window) if window else grid
            self.blocks.append(
                self._build_block(
                    drop_path=drop_path_rate * i / max(num_layers - 1, 1),
                    residual=i in residual_block_indexes,
                    with_cp=with_cp,
                    window_size=window,
                    rel_pos_size=rel_pos_size if use_rel_pos else None,
                    rel_pos_scaled=rel_pos_scaled,
                )
            )
            if use_rel_pos and rel_pos_std:
                trunc_normal_(self.blocks[-1].attn.rel_pos_h, std=rel_pos_std)
                trunc_normal_(self.blocks[-1].attn.rel_pos_w, std=rel_pos_std)
        if final_norm and len(self.blocks) == num_layers:
            self.norm = nn.LayerNorm(arch['embed_dims'], eps=1e-6)
        else:
            self.norm = nn.Identity()
        self.freeze()

    def _check_arch(self, arch: Dict[str, Any]) -> None:
        for key in ('embed_dims', 'num_layers', 'num_heads', 'mlp_ratio'):
            numbers = (int, float) if key == 'mlp_ratio' else int
            if not isinstance(arch[key], numbers) or arch[key] <= 0:
                raise ValueError(f'{self._get_name()}: {key} is a positive number, got {arch[key]!r}')
        if arch['embed_dims'] % arch['num_heads']:
            raise ValueError(
                f'{self._get_name()}: embed_dims is a multiple of num_heads, '
                f'got {arch["embed_dims"]} and {arch["num_heads"]}'
            )

    def _grid(self, name: str, img_size: Union[int, Sequence[int]], patch_size: int) -> Tuple[int, int]:
        size = img_size if isinstance(img_size, Sequence) else (img_size, img_size)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f'{self._get_name()}: {name} is a number of pixels or (H, W), got {img_size!r}')
        return -(-size[0] // patch_size), -(-size[1] // patch_size)

    def _build_stem(self, patch_size: int, grid: Tuple[int, int]) -> nn.Module:
        return PatchEmbedding(self.arch['embed_dims'], patch_size, grid, self.with_cls_token)

    def _build_block(self, **kwargs) -> nn.Module:
        return PlainBlock(self.arch['embed_dims'], self.arch['num_heads'], self.arch['mlp_ratio'], **kwargs)

    def check_converted(self, converted: Converted) -> None:
        foreign = converted.family == 'plainvit' and converted.source != 'mmvitzoo'
        if self.rel_pos_scaled and foreign and any('rel_pos' in key for key in converted.backbone):
            raise ValueError(
                f'relative positions of the {converted.source} layout are converted for rel_pos_scaled=False, '
                'the model has rel_pos_scaled=True'
            )

    def stages_to_freeze(self) -> List[nn.Module]:
        return [self.stem, *self.blocks]

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Maps, or class tokens, of the blocks in ``out_indices``.

        Args:
            x: Images, (B, 3, H, W), H and W of at least 32 pixels.

        Returns:
            Per block in ``out_indices`` a contiguous map of (B, ``embed_dims``, H', W'); H' and W'
            are H and W divided by ``patch_size``, rounded up. With ``out_type='cls_token'`` the
            token, (B, ``embed_dims``).

        Raises:
            ValueError: ``x`` is something else.
        """
        self.check_input(x)
        x = self.stem(x)
        size = x.shape[1:3]
        if self.with_cls_token:
            x = self.stem.with_token(x)
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.out_indices:
                outs.append(self._output(self.norm(x) if i == self.arch['num_layers'] - 1 else x, size))
        return tuple(outs)

    def _output(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if self.out_type == 'cls_token':
            return x[:, 0]
        if self.with_cls_token:
            x = x[:, 1:].unflatten(1, size)
        return x.permute(0, 3, 1, 2).contiguous()

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rate decay.

        Args:
            param_name: Full name of a parameter.
            prefix: What stands before the backbone's own names, such as ``'backbone.'``.

        Returns:
            The depth and the number of depths: 0 is the stem, 1 to ``num_layers`` the blocks, then
            the last norm and what follows the backbone. Residual convolutions, which no classifier
            has, go with what follows.
        """
        num_depths = self.arch['num_layers'] + 2
        part, *rest = param_name[len(prefix) :].split('.')
        if not param_name.startswith(prefix) or part == 'norm' or 'residual' in rest:
            return num_depths - 1, num_depths
        return 0 if part == 'stem' else int(rest[0]) + 1, num_depths

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
        fits = img_grid is not None and math.prod(img_grid) == num_patches
        grid = img_grid if fits else nearest_grid(num_patches)
        img_grid = img_grid or grid
        cfg['img_size'] = _pixels(img_grid, patch_size)
        if grid != img_grid:
            cfg['pretrain_img_size'] = _pixels(grid, patch_size)
        if grid[0] != grid[1] and not fits:
            name = 'img_size' if grid == img_grid else 'pretrain_img_size'
            assumed[name] = cfg[name]
        if patch_size != 16:
            cfg['patch_size'] = patch_size
        return cfg, assumed


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
