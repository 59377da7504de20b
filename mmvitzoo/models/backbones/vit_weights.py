"""Config of a plain ViT from its weights, for ``infer_cfg`` of PlainViT and ViTAE.

Shapes tell widths, depths and which options have weights. They do not tell the number of heads, windows beside tables
of one size, the grid of a position embedding that is not square, epsilons, activations, and the conventions of
positions. State dicts of this package carry these values as metadata of torch (``state_dict._metadata``), which
``torch.save`` keeps. Files of other sources lack them. Heads, windows, grids that are not square and the type of rotary
positions are then assumed, and returned as such. The rest comes from the layout, or else has PlainViT's defaults.
"""

import math
from collections import Counter
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from .base import count_weights, weight_shape

# Key of `PlainViT.metadata` in the metadata of a module. Files carry it, so it must not change.
METADATA_KEY = 'backbone_cfg'
SEQUENCES = ('pos_embed_grid', 'global_attn_indexes')  # sequences of integers; all other values are scalars


def save_metadata(
    module: nn.Module, state_dict: Dict[str, Tensor], prefix: str, local_metadata: Dict[str, Any]
) -> None:
    """Adds :attr:`.PlainViT.metadata` to the metadata of a state dict; a hook of ``state_dict``."""
    local_metadata[METADATA_KEY] = module.metadata


def backbone_metadata(content: Any) -> Optional[Dict[str, Any]]:
    """Returns :attr:`.PlainViT.metadata` that a state dict carries, or None.

    Args:
        content: State dict of a model or backbone. Metadata are its attribute, as torch has them, or its entry
            ``'_metadata'``, as readers of files return them.

    Returns:
        A copy with values of plain types alone, since files may hold any others.
    """
    modules = getattr(content, '_metadata', None)
    if modules is None and isinstance(content, Mapping):
        modules = content.get('_metadata')
    for module in modules.values() if isinstance(modules, Mapping) else ():
        if isinstance(module, Mapping) and isinstance(module.get(METADATA_KEY), Mapping):
            return {str(name): value for name, value in module[METADATA_KEY].items() if _is_plain(name, value)}
    return None


def _is_plain(name: str, value: Any) -> bool:
    if name in SEQUENCES:
        return isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)
    return isinstance(value, (bool, int, float, str))


def infer_plain_arch(
    state_dict: Dict[str, Tensor], arch_zoo: Dict[str, Dict[str, Any]], num_heads: Optional[int] = None
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Infers width, depth, heads and MLP ratio of plain blocks.

    The number of heads is given, or follows from relative positions, rotary periods or rotary frequencies. Without them
    it is assumed: that of a published variant, or else as many heads of at least 64 channels as divide the width.

    Args:
        state_dict: Weights of a backbone, without a prefix.
        arch_zoo: Published variants by name.
        num_heads: Number of heads, if metadata tell it.

    Returns:
        The arch, and the values that are assumed.

    Raises:
        ValueError: A weight is missing or misshapen, or the heads do not divide the width.
    """
    num_layers = count_weights(state_dict, 'blocks.{}.norm1.weight')
    dim, hidden_dim = weight_shape(state_dict, 'blocks.0.mlp.fc2.weight', 2)
    weight_shape(state_dict, 'blocks.0.mlp.fc1.weight', 2)
    arch: Dict[str, Any] = dict(embed_dims=dim, num_layers=num_layers, mlp_ratio=hidden_dim / dim)
    key, head_dim = _infer_head_dim(state_dict)
    if num_heads is None and head_dim is not None:
        if dim % head_dim:
            raise ValueError(f'{key} belongs to heads of {head_dim} channels, which do not divide {dim}')
        num_heads = dim // head_dim
    assumed = {}
    if num_heads is None:
        published = published_heads(arch_zoo, arch)
        if len(published) > 1:  # ViT-H, and DINOv3's H+ with a gated MLP and more heads
            num_heads = max(published) if is_gated(state_dict) else min(published)
        elif published:
            num_heads = published[0]
        else:
            num_heads = next(n for n in range(max(dim // 64, 1), 0, -1) if dim % n == 0)
        assumed['num_heads'] = num_heads
    return dict(arch, num_heads=num_heads), assumed


def _infer_head_dim(state_dict: Dict[str, Tensor]) -> Tuple[str, Optional[int]]:
    """Returns the channels of a head and the weight that tells them, or None."""
    key = 'blocks.0.attn.rel_pos_h'
    if key in state_dict:
        return key, weight_shape(state_dict, key, 2)[1]  # (L, head_dim)
    key = 'rope.periods'
    if key in state_dict:
        return key, 4 * weight_shape(state_dict, key, 1)[0]  # (head_dim / 4,)
    key = 'rope.freqs'
    if key in state_dict:
        return key, 2 * weight_shape(state_dict, key, 4)[3]  # (2, num_layers, num_heads, head_dim / 2)
    return '', None


def published_heads(arch_zoo: Dict[str, Dict[str, Any]], arch: Dict[str, Any]) -> List[int]:
    """Returns the numbers of heads of published variants, also of other libraries, that have a size.

    Args:
        arch_zoo: Published variants by name.
        arch: Size: ``embed_dims``, ``num_layers`` and ``mlp_ratio``.
    """
    # Without a name here: ViT-g and ViT-bigG of OpenCLIP, SigLIP 2's giant, Perception Encoder's G, MMPretrain's small
    others = [
        dict(embed_dims=1408, num_layers=40, num_heads=16, mlp_ratio=6144 / 1408),
        dict(embed_dims=1664, num_layers=48, num_heads=16, mlp_ratio=8192 / 1664),
        dict(embed_dims=1536, num_layers=40, num_heads=16, mlp_ratio=4),
        *(dict(embed_dims=1536, num_layers=depth, num_heads=16, mlp_ratio=8960 / 1536) for depth in (47, 50)),
        dict(embed_dims=768, num_layers=8, num_heads=8, mlp_ratio=3),
    ]
    variants = (dict(variant) for variant in (*arch_zoo.values(), *others))
    size = {name: arch[name] for name in ('embed_dims', 'num_layers', 'mlp_ratio')}
    return [x['num_heads'] for x in variants if {name: x[name] for name in size} == size]


def is_gated(state_dict: Dict[str, Tensor], mlp: str = 'blocks.0.mlp') -> bool:
    """Returns whether an MLP has a gate: its first layer is twice as wide as its second expects.

    Args:
        state_dict: Weights in the names of :class:`.PlainViT`.
        mlp: Name of the MLP.
    """
    return state_dict[f'{mlp}.fc1.weight'].shape[0] == 2 * state_dict[f'{mlp}.fc2.weight'].shape[1]


def infer_options(state_dict: Dict[str, Tensor], num_layers: int) -> Dict[str, Any]:
    """Infers the arguments of options that have weights of their own.

    Args:
        state_dict: Weights of a backbone, without a prefix.
        num_layers: Number of blocks.
    """
    cfg: Dict[str, Any] = dict(with_cls_token='cls_token' in state_dict, final_norm='norm.weight' in state_dict)
    if 'fc_norm.weight' in state_dict:
        cfg['out_type'] = 'avg_featmap'
    if 'reg_token' in state_dict:
        cfg['num_register_tokens'] = weight_shape(state_dict, 'reg_token', 3)[1]
    if 'blocks.0.ls1.gamma' in state_dict:
        cfg['layer_scale_init_value'] = 1e-5
    if is_gated(state_dict):
        cfg['ffn_type'] = 'swiglu'
    if 'norm_pre.weight' in state_dict:
        cfg['pre_norm'] = True
    if 'blocks.0.attn.qkv.bias' not in state_dict:
        cfg['qkv_bias'] = False
    residual = [block for block in range(num_layers) if f'blocks.{block}.residual.0.weight' in state_dict]
    if residual:
        cfg['residual_block_indexes'] = residual
    _, in_channels, *patch_size = weight_shape(state_dict, 'patch_embed.proj.weight', 4)
    if in_channels != 3:
        cfg['in_channels'] = in_channels
    if patch_size != [16, 16]:
        cfg['patch_size'] = patch_size[0] if patch_size[0] == patch_size[1] else tuple(patch_size)
    return cfg


def infer_windows(
    state_dict: Dict[str, Tensor], num_layers: int, metadata: Mapping[str, Any]
) -> Tuple[int, Tuple[int, ...], Optional[Tuple[int, int]], bool]:
    """Infers which blocks attend in windows: from metadata, or else from the tables of relative positions.

    Windows are square, and most blocks have them. Without metadata:

    - If the sizes of tables differ, the most common one is that of the windows. The other blocks are global.
    - If all tables have one size that is not square, all blocks are global.
    - If all tables have one square size, the last block of each quarter is assumed to be global as in ViTDet. With
      residual convolutions, which replace global attention, or with fewer than 4 blocks, none is.
    - Without tables, windows of 14 x 14 tokens are assumed beside residual convolutions. Other models are global, as
      all published ones are.

    Args:
        state_dict: Weights of a backbone, without a prefix.
        num_layers: Number of blocks.
        metadata: Metadata, which may be empty.

    Returns:
        Side of the windows in tokens, 0 if all blocks are global; the global blocks, listed only if others have
        windows; the grid (H, W) in tokens of the tables of global blocks, or None without such tables; and False if
        these values are assumed.
    """
    has_tables = 'blocks.0.attn.rel_pos_h' in state_dict
    has_residual = any('.residual.' in key for key in state_dict)
    grids = [table_grid(state_dict, block) for block in range(num_layers)] if has_tables else []
    if 'window_size' in metadata:
        window_size, indexes = metadata['window_size'], metadata.get('global_attn_indexes', ())
        global_blocks = tuple(block for block in range(num_layers) if not window_size or block in indexes)
        grid = grids[global_blocks[0]] if grids and global_blocks else None
        return window_size, global_blocks if window_size else (), grid, True
    if not has_tables:
        return (14, (), None, False) if has_residual else (0, (), None, True)
    (grid, _), *_ = Counter(grids).most_common(1)
    window_size = grid[0]
    global_blocks = tuple(block for block in range(num_layers) if grids[block] != (window_size, window_size))
    if len(global_blocks) == num_layers:
        return 0, (), grids[0], True
    if global_blocks:
        return window_size, global_blocks, grids[global_blocks[0]], True
    if num_layers >= 4 and not has_residual:
        return window_size, evenly_spaced(num_layers), grid, False
    return window_size, (), None, False


def table_grid(state_dict: Dict[str, Tensor], block: int) -> Tuple[int, int]:
    """Returns (H, W) in tokens of the relative positions of a block, whose tables have 2 H - 1 and 2 W - 1 rows."""
    height, width = (weight_shape(state_dict, f'blocks.{block}.attn.rel_pos_{axis}', 2)[0] for axis in 'hw')
    return (height + 1) // 2, (width + 1) // 2


def evenly_spaced(num_layers: int) -> Tuple[int, ...]:
    """Returns the last block of each quarter, the global blocks of ViTDet."""
    return tuple((i + 1) * num_layers // 4 - 1 for i in range(4))


def infer_positions(
    state_dict: Dict[str, Tensor],
    patch_size: Sequence[int],
    global_grid: Optional[Tuple[int, int]],
    saved_grid: Optional[Sequence[int]],
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Infers the sizes of images and the type of positions.

    Args:
        state_dict: Weights of a backbone, without a prefix.
        patch_size: (H, W) in pixels.
        global_grid: (H, W) in tokens of the relative positions of global blocks, if there are any.
        saved_grid: (H, W) in tokens of the position embedding or of scaled rotary positions, if metadata tell it.

    Returns:
        Arguments, and those of them that are assumed.
    """
    cfg: Dict[str, Any] = {}
    assumed: Dict[str, Any] = {}
    has_rope = any(key.startswith('rope.') for key in state_dict)
    if 'pos_embed' in state_dict:
        num_patches = weight_shape(state_dict, 'pos_embed', 3)[1] - ('cls_token' in state_dict)
        known = [grid for grid in (saved_grid, global_grid) if grid is not None and 0 < math.prod(grid) == num_patches]
        grid = tuple(known[0]) if known else nearest_grid(num_patches)
        cfg['img_size'] = in_pixels(global_grid or grid, patch_size)
        if global_grid not in (None, grid):
            cfg['pretrain_img_size'] = in_pixels(grid, patch_size)
        if not known and grid[0] != grid[1]:
            name = 'img_size' if global_grid is None else 'pretrain_img_size'
            assumed[name] = cfg[name]
        if has_rope:
            cfg['pos_type'] = 'learned+rope'
    elif 'blocks.0.attn.rel_pos_h' in state_dict:
        raise ValueError('pos_embed is missing')
    else:
        # Without a table, positions are rotary, even if rope.* is absent: many files do not store these buffers.
        cfg['pos_type'] = 'rope'
        if saved_grid is not None and 'rope.grid' in state_dict:
            cfg['img_size'] = in_pixels(saved_grid, patch_size)
    if 'rope.freqs' in state_dict:
        cfg['rope_type'] = 'mixed'
    elif 'rope.grid' in state_dict:  # the types with scaled coordinates
        cfg['rope_type'] = assumed['rope_type'] = 'pe' if 'pos_embed' in state_dict else 'sbb'
    elif 'pos_type' in cfg:  # 'axial' has the same keys; its layout tells it as metadata
        cfg['rope_type'] = assumed['rope_type'] = 'dinov3'
    return cfg, assumed


def fit_grid(num_patches: int, grid: Sequence[int]) -> Optional[Tuple[int, int]]:
    """Returns the grid (H, W) of a number of patches, of the ratio of ``grid`` or else square; None if neither fits."""
    height, width = (side // math.gcd(*grid) for side in grid)
    for ratio in ((height, width), (1, 1)):
        factor = math.isqrt(num_patches // math.prod(ratio))
        if factor and factor**2 * math.prod(ratio) == num_patches:
            return factor * ratio[0], factor * ratio[1]
    return None


def nearest_grid(num_patches: int) -> Tuple[int, int]:
    """Returns (H, W) of the grid nearest to a square, at least as wide as high."""
    if num_patches < 1:
        raise ValueError('pos_embed has no position of a patch')
    height = next(height for height in range(math.isqrt(num_patches), 0, -1) if num_patches % height == 0)
    return height, num_patches // height


def in_pixels(grid: Sequence[int], patch_size: Sequence[int]) -> Union[int, Tuple[int, int]]:
    """Returns the sides in pixels of a grid of patches, (H, W), or one number for a square."""
    height, width = (side * patch for side, patch in zip(grid, patch_size))
    return height if height == width else (height, width)
