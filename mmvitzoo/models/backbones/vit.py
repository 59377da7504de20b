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
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import Attention, LayerNorm2d, PatchEmbed, init_linear_weights, resize_pos_embed
from ..layers.padding import ceil_div
from .base import AttentionLayer, Backbone, count_weights, drop_path_rates, weight_shape

# torch.fx records a call of a wrapped function instead of tracing its branches on sizes.
torch.fx.wrap('resize_pos_embed')

OUT_TYPES = ('featmap', 'cls_token', 'avg_featmap', 'raw')


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
        """(B, H, W, C) -> (B, H, W, C), or (B, N, C) -> (B, N, C) if global and without relative positions."""

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
        img_size: Side in pixels, or (H, W), for which the position embedding and the relative positions of global
            blocks are learned. Both are interpolated for other images.
        pretrain_img_size: Side in pixels, or (H, W), of the position embedding, if it is another; None is
            ``img_size``. ViTDet keeps the position embedding of the classifier that it starts from.
        patch_size: Side of a patch in pixels.
        out_indices: Blocks whose maps are returned; None is the last.
        out_type: ``'featmap'`` returns maps; for MMPretrain's heads ``'cls_token'`` returns class tokens of (B, C),
            ``'avg_featmap'`` means over the map with a norm of their own, ``fc_norm``, (B, C), and ``'raw'`` all
            tokens, (B, N, C).
        output_cls_token: Return pairs of a map and its class token, as MMSegmentation's DPT head expects.
        final_norm: Normalize the output of the very last block.
        with_cls_token: Use a class token.
        window_size: Side of the attention windows in tokens; 0 is global attention.
        global_attn_indexes: Blocks with global attention where ``window_size`` is set.
        residual_block_indexes: Blocks that end in a residual convolution.
        use_rel_pos: Add decomposed relative positions in every block.
        rel_pos_std: Standard deviation of the initial relative positions. Published models start from 0; a small
            model without pretraining learns sooner from 0.5.
        rel_pos_scaled: Compute relative scores from the scaled query, see :class:`.Attention`. Leave False for
            converted checkpoints: the converter multiplies their tables by the scale. True is for weights that were
            trained in this package with True.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1).
        frozen_stages: -1 freezes nothing, 0 the patch embedding, class token and position embedding, k also the first
            k blocks. If all blocks are frozen, so is the last norm.
        with_cp: Use activation checkpointing in training.
        init_cfg: Initialization config of MMEngine.
        pretrained: Path or address of a checkpoint, short for ``init_cfg``.

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
    # Keys that a classifier lacks.
    optional_keys = (r'fc_norm\..+', r'blocks\.\d+\.attn\.rel_pos_[hw]', r'blocks\.\d+\.residual\..+')
    init_module = staticmethod(init_linear_weights)

    def __init__(
        self,
        arch: Union[str, Dict[str, Any]] = 'base',
        img_size: Union[int, Sequence[int]] = 224,
        pretrain_img_size: Union[int, Sequence[int], None] = None,
        patch_size: int = 16,
        out_indices: Optional[Sequence[int]] = None,
        out_type: str = 'featmap',
        output_cls_token: bool = False,
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
        pretrained: Optional[str] = None,
    ):
        arch = self._resolve_arch(arch)  # also here, for the default of out_indices
        self._check_arch(arch)
        num_layers, dim = arch['num_layers'], arch['embed_dims']
        out_indices = (num_layers - 1,) if out_indices is None else out_indices
        super().__init__(arch, num_layers, out_indices, drop_path_rate, frozen_stages, False, init_cfg, pretrained)
        if out_type not in OUT_TYPES:
            self._fail(f'out_type is one of {", ".join(OUT_TYPES)}, got {out_type!r}')
        if not with_cls_token and (out_type == 'cls_token' or output_cls_token):
            self._fail("out_type='cls_token' and output_cls_token need with_cls_token=True")
        if output_cls_token and out_type != 'featmap':
            self._fail(f"output_cls_token needs out_type='featmap', got {out_type!r}")
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
        self.output_cls_token = output_cls_token
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
        if out_type == 'avg_featmap':
            self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        self.finish_init()

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

    def check_compatible(self, result: Any) -> None:
        # The scale is not folded into the tables of ViTAE, a subclass.
        is_folded = result.family == 'plainvit' and result.source != 'mmvitzoo'
        if self.rel_pos_scaled and is_folded and any('rel_pos' in key for key in result.backbone):
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
            stride, window_size = self.strides[0], block.attn.window_size
            layers.append(
                AttentionLayer(
                    block=i,
                    stage=4 * i // len(self.blocks),
                    attn_type='window' if window_size else 'global',
                    attn=block.attn,
                    q_stride=stride,
                    k_stride=stride,
                    window_size=window_size * stride,
                    num_prefix_tokens=int(self.with_cls_token),
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

    def stage_maps(self, x: Tensor) -> Iterator[Tuple[Tensor, Optional[Tensor]]]:
        for tokens, size in self._block_outputs(x):
            yield self._split(tokens, size)

    def _block_outputs(self, x: Tensor) -> Iterator[Tuple[Tensor, Sequence[int]]]:
        """Yields the output of each block, (B, H', W', C) or (B, 1 + H' * W', C) with a class token, and (H', W')."""
        x = self.patch_embed(x)  # (B, H', W', C)
        size = x.shape[1:3]
        x = self._pos_embed(x)
        for block in self.blocks:
            x = block(x)
            yield x, size

    def _split(self, x: Tensor, size: Sequence[int]) -> Tuple[Tensor, Optional[Tensor]]:
        """Returns the map of (B, H', W', C), and the class token of (B, 1, C) or None."""
        return (x[:, 1:].unflatten(1, size), x[:, :1]) if self.with_cls_token else (x, None)

    def output_norm(self, index: int) -> nn.Module:
        """Returns the last norm for the very last block, and an identity for others."""
        return self.norm if index == self.arch['num_layers'] - 1 else self.no_norm

    def intermediate_norm(self, index: int) -> nn.Module:
        """Returns the last norm for every block, as timm does."""
        return self.norm

    def forward(self, x: Tensor) -> Tuple[Union[Tensor, Tuple[Tensor, Tensor]], ...]:
        """Computes the maps, tokens or means of the blocks in ``out_indices``.

        Args:
            x: Images, (B, 3, H, W), H and W at least one patch.

        Returns:
            For each index a contiguous map of (B, ``embed_dims``, H', W'); H' and W' are H and W divided by
            ``patch_size``, rounded up. Other features, or a map with its class token, if ``out_type`` or
            ``output_cls_token`` asks for them.

        Raises:
            ValueError: ``x`` has another shape.
        """
        self.check_input(x)
        outs = []
        for i, (tokens, size) in enumerate(self._block_outputs(x)):
            if i not in self.out_indices:
                continue
            out = self.output_norm(i)(tokens)
            y, cls_token = self._split(out, size)
            if self.out_type == 'cls_token':
                outs.append(cls_token[:, 0])
            elif self.out_type == 'avg_featmap':
                outs.append(self.fc_norm(y.mean((1, 2))))
            elif self.out_type == 'raw':
                outs.append(out if self.with_cls_token else out.flatten(1, 2))
            else:
                feature_map = y.permute(0, 3, 1, 2).contiguous()
                outs.append((feature_map, cls_token[:, 0]) if self.output_cls_token else feature_map)
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        num_depths = self.arch['num_layers'] + 2
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        part, *rest = param_name[len(prefix) :].split('.')
        # Residual convolutions, which no classifier has, belong to the last depth.
        if part in ('norm', 'fc_norm') or 'residual' in rest:
            return num_depths - 1, num_depths
        depth = int(rest[0]) + 1 if part == 'blocks' else 0
        return depth, num_depths

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Infers the config.

        Assumes, where shapes do not tell, the number of heads (see :func:`infer_plain_arch`), four evenly spaced global
        blocks, windows of 14 x 14 tokens beside residual convolutions, and the grid nearest to a square.
        """
        arch, assumed = infer_plain_arch(state_dict, cls.arch_zoo)
        num_layers, with_cls_token = arch['num_layers'], 'cls_token' in state_dict
        cfg = dict(
            type=cls.__name__,
            arch=next((name for name, variant in cls.arch_zoo.items() if variant == arch), arch),
            with_cls_token=with_cls_token,
            final_norm='norm.weight' in state_dict,
        )
        if 'fc_norm.weight' in state_dict:
            cfg['out_type'] = 'avg_featmap'
        residual = [block for block in range(num_layers) if f'blocks.{block}.residual.0.weight' in state_dict]
        if residual:
            cfg['residual_block_indexes'] = residual
        global_grid = None
        if 'blocks.0.attn.rel_pos_h' in state_dict:
            window_size, global_blocks, global_grid = infer_window_attention(state_dict, num_layers)
            if global_grid is None:
                if not residual and num_layers >= 4:
                    global_blocks, global_grid = evenly_spaced(num_layers), (window_size, window_size)
                assumed.update(window_size=window_size, global_attn_indexes=global_blocks)
            cfg.update(use_rel_pos=True, window_size=window_size)
            if global_blocks:
                cfg['global_attn_indexes'] = global_blocks
        elif residual:
            cfg['window_size'] = assumed['window_size'] = 14

        num_patches = weight_shape(state_dict, 'pos_embed', 3)[1] - with_cls_token
        patch_size = weight_shape(state_dict, 'patch_embed.proj.weight', 4)[-1]
        if global_grid is not None and math.prod(global_grid) == num_patches:
            pos_embed_grid = global_grid
        else:
            pos_embed_grid = nearest_grid(num_patches)
        cfg['img_size'] = _pixels(global_grid or pos_embed_grid, patch_size)
        if global_grid not in (None, pos_embed_grid):
            cfg['pretrain_img_size'] = _pixels(pos_embed_grid, patch_size)
        if pos_embed_grid != global_grid and pos_embed_grid[0] != pos_embed_grid[1]:
            name = 'img_size' if global_grid is None else 'pretrain_img_size'
            assumed[name] = cfg[name]
        if patch_size != 16:
            cfg['patch_size'] = patch_size
        return cfg, assumed

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Fits the position embedding of a checkpoint, and drops a class token that the model does not have."""
        if self.pos_embed is not None:  # None in ViTAE-S
            if self.cls_token is None and state_dict.pop(f'{prefix}cls_token', None) is not None:
                print_log(f'{self._get_name()}: dropped the class token of the checkpoint', logger='current')
            self._fit_pos_embed(state_dict, f'{prefix}pos_embed')
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit_pos_embed(self, state_dict: Dict[str, Tensor], key: str) -> None:
        """Resizes a square position embedding with another number of tokens, and drops the place of a class token."""
        loaded = state_dict.get(key)
        if loaded is None or loaded.dim() != 3 or loaded.shape[1] == self.pos_embed.shape[1]:
            return
        num_cls = int(self.with_cls_token)
        side = math.isqrt(loaded.shape[1])
        loaded_cls = loaded.shape[1] - side**2  # 1 if the file has the place of a class token
        if loaded_cls not in (0, 1) or loaded_cls < num_cls:
            return  # reported as a mismatch
        patches = resize_pos_embed(loaded[:, loaded_cls:], (side, side), self.pos_embed_grid).flatten(1, 2)
        state_dict[key] = torch.cat([loaded[:, :num_cls], patches], 1)  # (1, num_cls + H * W, C)
        if (side, side) != self.pos_embed_grid:
            grids = f'{side} x {side} to {self.pos_embed_grid[0]} x {self.pos_embed_grid[1]}'
            print_log(f'{self._get_name()}: resized positions from {grids}', logger='current')


def infer_plain_arch(
    state_dict: Dict[str, Tensor], arch_zoo: Dict[str, Dict[str, Any]]
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Infers width, depth, heads and MLP ratio of plain blocks; returns the arch and the values that are assumed.

    The number of heads follows from the width of relative positions. Without them it is assumed: that of a published
    variant, or else as many heads of at least 64 channels as divide the width.
    """
    num_layers = count_weights(state_dict, 'blocks.{}.norm1.weight')
    hidden_dim, dim = weight_shape(state_dict, 'blocks.0.mlp.fc1.weight', 2)
    arch: Dict[str, Any] = dict(embed_dims=dim, num_layers=num_layers, mlp_ratio=hidden_dim / dim)
    assumed = {}
    if 'blocks.0.attn.rel_pos_h' in state_dict:
        head_dim = weight_shape(state_dict, 'blocks.0.attn.rel_pos_h', 2)[1]
        if dim % head_dim:
            raise ValueError(f'blocks.0.attn.rel_pos_h has {head_dim} channels, which do not divide {dim}')
        num_heads = dim // head_dim
    else:
        published = (variant['num_heads'] for variant in arch_zoo.values() if arch.items() <= variant.items())
        heads_of_64 = next(n for n in range(max(dim // 64, 1), 0, -1) if dim % n == 0)
        num_heads = assumed['num_heads'] = next(published, heads_of_64)
    return dict(arch, num_heads=num_heads), assumed


def infer_window_attention(
    state_dict: Dict[str, Tensor], num_layers: int
) -> Tuple[int, Tuple[int, ...], Optional[Tuple[int, int]]]:
    """Infers the form of attention from the tables of relative positions: most blocks attend in windows.

    Args:
        state_dict: Weights of a backbone, without a prefix.
        num_layers: Number of blocks.

    Returns:
        Side of the windows in tokens, the global blocks, and their grid (H, W). If the tables of all blocks have one
        size, the last two are () and None.
    """
    grids = [  # (H, W) in tokens of each block
        tuple((weight_shape(state_dict, f'blocks.{block}.attn.rel_pos_{axis}', 2)[0] + 1) // 2 for axis in 'hw')
        for block in range(num_layers)
    ]
    (grid, _), *_ = Counter(grids).most_common(1)
    window_size = grid[0]
    global_blocks = tuple(block for block in range(num_layers) if grids[block] != (window_size, window_size))
    return window_size, global_blocks, grids[global_blocks[0]] if global_blocks else None


def evenly_spaced(num_layers: int) -> Tuple[int, ...]:
    """Returns the last block of each quarter, the global blocks of ViTDet."""
    return tuple((i + 1) * num_layers // 4 - 1 for i in range(4))


def nearest_grid(num_patches: int) -> Tuple[int, int]:
    """Returns rows and columns of the grid nearest to a square, at least as wide as high."""
    if num_patches < 1:
        raise ValueError('pos_embed has no position of a patch')
    rows = next(rows for rows in range(math.isqrt(num_patches), 0, -1) if num_patches % rows == 0)
    return rows, num_patches // rows


def _pixels(grid: Tuple[int, int], patch_size: int) -> Union[int, Tuple[int, int]]:
    height, width = (side * patch_size for side in grid)
    return height if height == width else (height, width)
