"""Plain vision transformers, for classification, segmentation and ViTDet.

ViT: Dosovitskiy et al., ICLR 2021, https://arxiv.org/abs/2010.11929
ViTDet: Li et al., ECCV 2022, https://arxiv.org/abs/2203.16527
DeiT III: Touvron et al., ECCV 2022, https://arxiv.org/abs/2204.07118
DINOv2: Oquab et al., https://arxiv.org/abs/2304.07193; with registers: Darcet et al., https://arxiv.org/abs/2309.16588
DINOv3: Siméoni et al., https://arxiv.org/abs/2508.10104
Perception Encoder: Bolya et al., https://arxiv.org/abs/2504.13181
RoPE-ViT: Heo et al., ECCV 2024, https://arxiv.org/abs/2403.13298

All blocks have one stride and one width. For segmentation and classification, every block attends globally. ViTDet
attends in windows, adds decomposed relative positions, and propagates information across windows in a few blocks,
by global attention or by a residual convolution. DINOv2 adds layer scale and registers, DINOv3,
Perception Encoder and RoPE-ViT add rotary positions.

Maps are (B, H, W, C) between blocks. With P prefix tokens (class token, then registers), tokens are
(B, P + H * W, C).
"""

import inspect
import logging
import math
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from timm.layers import DropPath, GluMlp, Mlp, QuickGELU, resample_patch_embed, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import (
    Attention,
    LayerNorm2d,
    LayerScale,
    PatchEmbed,
    RotaryPositions,
    init_linear_weights,
    resize_pos_embed,
)
from ..layers.padding import ceil_div
from ..layers.rope import ROPE_TYPES
from .base import AttentionLayer, Backbone, drop_path_rates, is_number
from .vit_weights import (
    METADATA_KEY,
    backbone_metadata,
    fit_grid,
    in_pixels,
    infer_options,
    infer_plain_arch,
    infer_positions,
    infer_windows,
    save_metadata,
)

# torch.fx records a call of a wrapped function instead of tracing its branches on sizes.
torch.fx.wrap('resize_pos_embed')

OUT_TYPES = ('featmap', 'cls_token', 'avg_featmap', 'raw')
FFN_TYPES = ('mlp', 'swiglu')
POS_TYPES = ('learned', 'rope', 'learned+rope')
ACTS = dict(gelu=nn.GELU, gelu_tanh=partial(nn.GELU, approximate='tanh'), quick_gelu=QuickGELU)
# Attributes that `PlainViT.metadata` has, beside heads, grid and windows. Weights also load into a model with other
# values: `check_compatible` refuses some, `log_differences` logs the others but for `norm_outputs`.
METADATA = (
    'rel_pos_scaled',
    'norm_eps',
    'norm_outputs',
    'act',
    'rope_type',
    'interpolate_offset',
    'interpolate_antialias',
)


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
        ffn_type: ``'mlp'``, or ``'swiglu'`` for a gated MLP (https://arxiv.org/abs/2002.05202).
        act: Activation of the MLP, a key of :data:`ACTS`.
        norm_eps: Epsilon of the norms.
        layer_scale_init_value: Initial value of layer scale; 0 is no layer scale.
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
        ffn_type: str = 'mlp',
        act: str = 'gelu',
        norm_eps: float = 1e-6,
        layer_scale_init_value: float = 0.0,
        drop_path: float = 0.0,
        residual: bool = False,
        with_cp: bool = False,
        **attention: Any,
    ):
        super().__init__()
        self.with_cp = with_cp
        hidden_dim = round(dim * mlp_ratio)
        scale = layer_scale_init_value
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, **attention)
        self.ls1 = LayerScale(dim, scale) if scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        if ffn_type == 'swiglu':  # fc1 gives the gate, then the value
            self.mlp = GluMlp(dim, 2 * hidden_dim, act_layer=nn.SiLU, gate_last=False)
        else:
            self.mlp = Mlp(dim, hidden_dim, act_layer=ACTS[act])
        self.ls2 = LayerScale(dim, scale) if scale else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.residual = ResidualConv(dim) if residual else nn.Identity()

    def forward(self, x: Tensor, rope: Optional[Tuple[Tensor, Tensor, bool]] = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), or (B, N, C) -> (B, N, C) if global and without relative positions.

        ``rope`` is the rotation of queries and keys, see :class:`.Attention`.
        """

        def inner_forward(x: Tensor) -> Tensor:
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rope)))
            x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
            return self.residual(x)

        if self.with_cp and self.training:
            return checkpoint(inner_forward, x, use_reentrant=False)
        return inner_forward(x)


@MODELS.register_module()
class PlainViT(Backbone):
    """Plain vision transformer (https://arxiv.org/abs/2010.11929), also as in ViTDet (https://arxiv.org/abs/2203.16527).

    With the options below it is also the backbone of DeiT III, DINOv2, DINOv3, CLIP, SigLIP, Perception Encoder and
    RoPE-ViT. Their converted checkpoints tell which options they need. Parameters have the names of timm's
    ``VisionTransformer``; its ``Eva``, such as DINOv3, has others, which the converter renames. Every map has stride
    ``patch_size`` and ``embed_dims`` channels. See :class:`.Backbone` for arguments that all backbones share.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'medium'``, ``'base'``, ``'large'``, ``'huge'``, ``'so400m'`` (SigLIP),
            ``'giant'`` (DINOv2), ``'huge_plus'``, ``'7b'`` (both DINOv3), or a dict of ``embed_dims``, ``num_layers``,
            ``num_heads`` and ``mlp_ratio``. ``'giant'``, ``'huge_plus'`` and ``'7b'`` are published with
            ``ffn_type='swiglu'``, which has to be passed with them. DINOv3's S+ is ``'small'`` with it.
        img_size: Side in pixels, or (H, W), for which the relative positions of global blocks are learned. They are
            interpolated for other images.
        pretrain_img_size: Side in pixels, or (H, W), for which the position embedding is learned, and to which ``'pe'``
            and ``'sbb'`` scale rotary coordinates. Positions are interpolated for other images. None is ``img_size``.
            Detectron2's ViTDet has ``img_size=1024, pretrain_img_size=224``.
        patch_size: Side of a patch in pixels, or (H, W). The patch embedding of a checkpoint is resampled if its
            patches have another size (https://arxiv.org/abs/2212.08013).
        in_channels: Channels of the image.
        out_indices: Blocks whose maps are returned; None is the last.
        out_type: ``'featmap'`` returns maps; for MMPretrain's heads ``'cls_token'`` returns class tokens of (B, C),
            ``'avg_featmap'`` means over the map with a norm of their own, ``fc_norm``, (B, C), and ``'raw'`` all
            tokens, (B, N, C).
        output_cls_token: Return pairs of a map and its class token, as MMSegmentation's DPT head expects. It needs
            ``out_type='featmap'``.
        final_norm: Build the last norm. It normalizes the output of the very last block.
        norm_outputs: Apply the last norm to the output of every block in ``out_indices``, as DINOv2 and DINOv3 do.
        with_cls_token: Use a class token.
        num_register_tokens: Number of register tokens, which have no position and are in no map. Class token and
            registers have no place in windows; models with windows go without both.
        pos_type: ``'learned'`` for a table, ``'rope'`` for rotary positions in attention, as in DINOv3, or
            ``'learned+rope'`` for both, as in Perception Encoder.
        rope_type: Convention of the rotary positions: ``'dinov3'``, ``'pe'`` (Perception Encoder), ``'sbb'`` (timm's
            ``vit_*_rope_reg*_gap_256``), ``'axial'`` or ``'mixed'`` (both RoPE-ViT, mixed ones are learned). The
            published models also differ in ``pre_norm``, ``norm_eps`` and others;
            ``mmvitzoo.checkpoints.convert(state_dict).backbone_cfg`` has the arguments that fit a file. See
            :class:`mmvitzoo.models.layers.RotaryPositions`.
        interpolate_offset: Number that is added to the sides of the new grid before they are divided by those of the
            table: 0.1 for DINOv2 without registers in the authors' implementation, 0 in Hugging Face's and timm's.
        interpolate_antialias: Resize the table with antialiasing, as timm and DINOv2 with registers do.
        layer_scale_init_value: Initial value of layer scale, such as 1e-5; 0 is no layer scale.
        ffn_type: ``'mlp'``, or ``'swiglu'`` for a gated MLP.
        act: ``'gelu'``, ``'gelu_tanh'`` (SigLIP) or ``'quick_gelu'`` (OpenAI's CLIP). A gated MLP has SiLU instead.
        norm_eps: Epsilon of the norms.
        pre_norm: Normalize the tokens before the first block, as CLIP does.
        qkv_bias: Add a bias to queries, keys and values.
        window_size: Side of the attention windows in tokens; 0 is global attention.
        global_attn_indexes: Blocks with global attention where ``window_size`` is set.
        residual_block_indexes: Blocks that end in a residual convolution.
        use_rel_pos: Add decomposed relative positions in every block.
        rel_pos_std: Standard deviation of the initial relative positions. Published models start from 0; a small
            model without pretraining learns sooner from 0.5.
        rel_pos_scaled: False computes relative scores as ``q . R``, as Detectron2, Segment Anything and Hugging Face
            do. True computes ``(q * head_dim**-0.5) . R``, as the ViTDet of the ViTAE authors does. The converter
            multiplies the tables of the latter by the scale, so that all converted checkpoints have False. True is for
            weights that were trained in this package with True.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1).
        frozen_stages: -1 freezes nothing, 0 what comes before the blocks (patch embedding, positions, class token,
            registers, norm), k also the first k blocks. If all blocks are frozen, so is the last norm.
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
        'medium': dict(embed_dims=512, num_layers=12, num_heads=8, mlp_ratio=4),
        'base': dict(embed_dims=768, num_layers=12, num_heads=12, mlp_ratio=4),
        'large': dict(embed_dims=1024, num_layers=24, num_heads=16, mlp_ratio=4),
        'huge': dict(embed_dims=1280, num_layers=32, num_heads=16, mlp_ratio=4),
        'so400m': dict(embed_dims=1152, num_layers=27, num_heads=16, mlp_ratio=4304 / 1152),
        'giant': dict(embed_dims=1536, num_layers=40, num_heads=24, mlp_ratio=4096 / 1536),
        'huge_plus': dict(embed_dims=1280, num_layers=32, num_heads=20, mlp_ratio=4),
        '7b': dict(embed_dims=4096, num_layers=40, num_heads=32, mlp_ratio=2),
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
        patch_size: Union[int, Sequence[int]] = 16,
        in_channels: int = 3,
        out_indices: Optional[Sequence[int]] = None,
        out_type: str = 'featmap',
        output_cls_token: bool = False,
        final_norm: bool = True,
        norm_outputs: bool = False,
        with_cls_token: bool = True,
        num_register_tokens: int = 0,
        pos_type: str = 'learned',
        rope_type: str = 'dinov3',
        interpolate_offset: float = 0.0,
        interpolate_antialias: bool = False,
        layer_scale_init_value: float = 0.0,
        ffn_type: str = 'mlp',
        act: str = 'gelu',
        norm_eps: float = 1e-6,
        pre_norm: bool = False,
        qkv_bias: bool = True,
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
        arch = self._resolve_arch(arch)  # the base does it, too; num_layers is the default of out_indices
        self._check_arch(arch)
        num_layers, dim = arch['num_layers'], arch['embed_dims']
        out_indices = (num_layers - 1,) if out_indices is None else out_indices
        super().__init__(
            arch,
            num_outputs=num_layers,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            init_cfg=init_cfg,
            pretrained=pretrained,
            in_channels=in_channels,
        )
        for name, value, allowed in (
            ('out_type', out_type, OUT_TYPES),
            ('ffn_type', ffn_type, FFN_TYPES),
            ('pos_type', pos_type, POS_TYPES),
            ('rope_type', rope_type, ROPE_TYPES),
            ('act', act, ACTS),
        ):
            if value not in tuple(allowed):
                self._fail(f'{name} is one of {", ".join(allowed)}, got {value!r}')
        if pos_type == 'learned' and rope_type != DEFAULTS['rope_type']:
            self._fail(f"rope_type={rope_type!r} needs pos_type='rope' or 'learned+rope'")
        self._check_flags(
            output_cls_token=output_cls_token,
            final_norm=final_norm,
            norm_outputs=norm_outputs,
            with_cls_token=with_cls_token,
            interpolate_antialias=interpolate_antialias,
            pre_norm=pre_norm,
            qkv_bias=qkv_bias,
            use_rel_pos=use_rel_pos,
            rel_pos_scaled=rel_pos_scaled,
            with_cp=with_cp,
        )
        self._check_number('window_size', window_size, least=0)
        for name, value in (
            ('norm_eps', norm_eps),
            ('interpolate_offset', interpolate_offset),
            ('layer_scale_init_value', layer_scale_init_value),
            ('rel_pos_std', rel_pos_std),
        ):
            self._check_number(name, value, least=0, types=(int, float))
        if not with_cls_token and (out_type == 'cls_token' or output_cls_token):
            self._fail("out_type='cls_token' and output_cls_token need with_cls_token=True")
        if output_cls_token and out_type != 'featmap':
            self._fail(f"output_cls_token needs out_type='featmap', got {out_type!r}")
        self._check_number('num_register_tokens', num_register_tokens, least=0)
        if (with_cls_token or num_register_tokens) and (window_size or use_rel_pos or residual_block_indexes):
            self._fail(
                'window_size, use_rel_pos and residual_block_indexes need with_cls_token=False and '
                'num_register_tokens=0: these tokens have no position on the map'
            )
        head_dim = dim // arch['num_heads']
        if pos_type != 'learned' and (window_size or use_rel_pos or head_dim % 4):
            self._fail(
                f'pos_type={pos_type!r} needs global attention without use_rel_pos and heads of a multiple of 4 '
                'channels'
            )
        if norm_outputs and not final_norm:
            self._fail('norm_outputs needs final_norm=True')
        for name, indexes in (
            ('global_attn_indexes', global_attn_indexes),
            ('residual_block_indexes', residual_block_indexes),
        ):
            if not isinstance(indexes, Sequence) or not all(is_number(i) and 0 <= i < num_layers for i in indexes):
                self._fail(f'{name} are blocks from 0 to {num_layers - 1}, got {indexes!r}')
        if global_attn_indexes and not window_size:
            self._fail('global_attn_indexes without window_size, where every block is global')
        patch_size = self._check_size('patch_size', patch_size)
        img_size = self._check_size('img_size', img_size)
        pretrain_img_size = img_size if pretrain_img_size is None else pretrain_img_size
        pretrain_img_size = self._check_size('pretrain_img_size', pretrain_img_size)

        self.out_type = out_type
        self.output_cls_token = output_cls_token
        self.norm_outputs = norm_outputs
        self.rel_pos_scaled = rel_pos_scaled
        self.with_cls_token = with_cls_token
        self.num_prefix_tokens = int(with_cls_token) + num_register_tokens
        self.pos_type, self.rope_type = pos_type, rope_type
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        self.ffn_type, self.act, self.norm_eps = ffn_type, act, norm_eps
        self.num_register_tokens = num_register_tokens
        self.layer_scale_init_value, self.qkv_bias = layer_scale_init_value, qkv_bias
        self.window_size, self.global_attn_indexes = window_size, tuple(global_attn_indexes)
        self.out_channels = (dim,) * num_layers
        # A number for square patches, else (H, W)
        self.strides = (patch_size[0] if patch_size[0] == patch_size[1] else patch_size,) * num_layers
        rel_pos_grid = _grid(img_size, patch_size)
        self.pos_embed_grid = _grid(pretrain_img_size, patch_size)
        self.rope = None
        if pos_type != 'learned':
            self.rope = RotaryPositions(
                head_dim,
                self.num_prefix_tokens,
                rope_type,
                offset=int(with_cls_token and rope_type == 'pe'),  # PE counts from 1 beside a class token
                grid=self.pos_embed_grid,
                num_heads=arch['num_heads'],
                num_layers=self.out_indices[-1] + 1,
            )
        self._build_stem(patch_size)
        self.reg_token = nn.Parameter(torch.zeros(1, num_register_tokens, dim)) if num_register_tokens else None
        if num_register_tokens:
            trunc_normal_(self.reg_token, std=0.02)
        self.norm_pre = nn.LayerNorm(dim, eps=norm_eps) if pre_norm else nn.Identity()
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
        has_norm = norm_outputs or (final_norm and len(self.blocks) == num_layers)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if has_norm else nn.Identity()
        if out_type == 'avg_featmap':
            self.fc_norm = nn.LayerNorm(dim, eps=norm_eps)
        self._register_state_dict_hook(save_metadata)
        self.finish_init()

    def _check_arch(self, arch: Dict[str, Any]) -> None:
        for key in ('embed_dims', 'num_layers', 'num_heads'):
            self._check_number(key, arch[key])
        if not is_number(arch['mlp_ratio'], (int, float)) or not 0 < arch['mlp_ratio'] < math.inf:
            self._fail(f'mlp_ratio is a positive number, got {arch["mlp_ratio"]!r}')
        if arch['embed_dims'] % arch['num_heads']:
            self._fail(f'embed_dims is a multiple of num_heads, got {arch["embed_dims"]} and {arch["num_heads"]}')

    def _build_stem(self, patch_size: Tuple[int, int]) -> None:
        dim = self.arch['embed_dims']
        self.patch_embed = PatchEmbed(self.in_channels, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if self.with_cls_token else None
        if self.with_cls_token:
            trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed = None
        if self.pos_type != 'rope':
            self.pos_embed = nn.Parameter(torch.zeros(1, self.with_cls_token + math.prod(self.pos_embed_grid), dim))
            trunc_normal_(self.pos_embed, std=0.02)

    def _build_block(self, **kwargs: Any) -> nn.Module:
        return Block(
            self.arch['embed_dims'],
            self.arch['num_heads'],
            self.arch['mlp_ratio'],
            ffn_type=self.ffn_type,
            act=self.act,
            norm_eps=self.norm_eps,
            layer_scale_init_value=self.layer_scale_init_value,
            qkv_bias=self.qkv_bias,
            **kwargs,
        )

    def check_compatible(self, result: Any) -> None:
        # The comparison below does not see these: no layout of another source tells rel_pos_scaled. All their tables
        # are for the unscaled query; `fold_scale` multiplies those of the ViTAE authors' ViTDet. ViTAE, a subclass, has
        # the family 'vitae'.
        is_for_unscaled = result.family == 'plainvit' and result.source != 'mmvitzoo'
        if self.rel_pos_scaled and is_for_unscaled and any('rel_pos' in key for key in result.backbone):
            raise ValueError(
                f'relative positions of the {result.source} layout are converted for rel_pos_scaled=False, '
                'the model has rel_pos_scaled=True'
            )
        cfg = result.backbone_cfg
        if self.with_cls_token and not cfg['with_cls_token']:
            raise ValueError('the weights have no class token, the model has with_cls_token=True')
        # Models with windows have no place for registers: these are left out.
        own = dict(
            in_channels=self.in_channels,
            pos_type=self.pos_type,
            ffn_type=self.ffn_type,
            pre_norm=not isinstance(self.norm_pre, nn.Identity),
            num_register_tokens=cfg.get('num_register_tokens', 0) if self.window_size else self.num_register_tokens,
        )
        # If only the file has them, nothing would tell; if only the model has them, loading reports missing weights.
        for name in ('layer_scale_init_value', 'qkv_bias'):
            if not getattr(self, name):
                own[name] = getattr(self, name)
        told = backbone_metadata(result.state_dict) or {}  # of the file or of its layout; a guess refuses nothing
        has_tables = result.family == 'plainvit' and 'blocks.0.attn.rel_pos_h' in result.backbone
        if has_tables and 'rel_pos_scaled' in told:
            own['rel_pos_scaled'] = self.rel_pos_scaled
        if 'rope' in cfg.get('pos_type', '') and ('rope_type' in told or 'rope_type' not in result.assumed):
            own['rope_type'] = self.rope_type
        loaded = {name: cfg.get(name, DEFAULTS[name]) for name in own}
        # Weights for 3 channels are adapted while they are loaded.
        other = [name for name in own if own[name] != loaded[name] and (name, loaded[name]) != ('in_channels', 3)]
        theirs, ours = ([f'{name}={values[name]!r}' for name in other] for values in (loaded, own))
        loaded_arch = self.arch_of(cfg)
        if not self._has_size_of(loaded_arch):
            theirs.insert(0, self._describe_arch(loaded_arch))
            ours.insert(0, self._describe_arch(self.arch))
        elif loaded_arch['num_heads'] != self.arch['num_heads'] and 'num_heads' not in result.assumed:
            theirs.append(f'num_heads={loaded_arch["num_heads"]}')
            ours.append(f'num_heads={self.arch["num_heads"]}')
        if theirs:
            raise ValueError(f'the weights belong to {", ".join(theirs)}, the model has {", ".join(ours)}')

    def _has_size_of(self, arch: Dict[str, Any]) -> bool:
        """Returns whether blocks have the same widths. Weights may have fewer, of a model without later ones."""
        return arch['num_layers'] <= self.arch['num_layers'] and _widths(arch) == _widths(self.arch)

    def _describe_arch(self, arch: Dict[str, Any]) -> str:
        name = self.variant_name(arch)
        width, hidden_dim = _widths(arch)
        size = f' ({arch["num_layers"]} blocks of {width} channels, MLPs of {hidden_dim})'
        return f'arch={name!r}{size if isinstance(name, str) else ""}'

    def log_differences(self, result: Any) -> None:
        # Normalized outputs are a choice of the user. check_compatible compares the scale of relative positions.
        own = {name: getattr(self, name) for name in METADATA if name not in ('rel_pos_scaled', 'norm_outputs')}
        if self.rope is None:
            own.pop('rope_type')
        loaded = {name: result.backbone_cfg.get(name, DEFAULTS[name]) for name in own}
        own['num_heads'], loaded['num_heads'] = self.arch['num_heads'], self.arch_of(result.backbone_cfg)['num_heads']
        told = {'num_heads', *result.backbone_cfg, *(backbone_metadata(result.state_dict) or {})} - set(result.assumed)
        for name, value in own.items():
            if value != loaded[name]:
                note = '' if name in told else ', which is assumed'
                print_log(
                    f'{self._get_name()}: the weights belong to {name}={loaded[name]!r}{note}; '
                    f'the model has {name}={value!r}',
                    logger='current',
                    level=logging.WARNING,
                )

    def stages_to_freeze(self) -> List[List[Union[nn.Module, nn.Parameter]]]:
        stem = (self.patch_embed, self.pos_embed, self.cls_token, self.reg_token, self.norm_pre, self.rope)
        stem = [x for x in stem if x is not None]
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
                    window_size=in_pixels(to_2tuple(window_size), to_2tuple(stride)),
                    num_prefix_tokens=self.num_prefix_tokens,
                )
            )
        return layers

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Adds positions and prefix tokens: (B, H, W, C) -> (B, H, W, C), or (B, P + H * W, C) with P prefix tokens."""
        cls_token = self.cls_token
        if self.pos_embed is not None:
            num_cls = int(self.with_cls_token)
            x = x + resize_pos_embed(
                self.pos_embed[:, num_cls:],
                self.pos_embed_grid,
                x.shape[1:3],
                self.interpolate_offset,
                self.interpolate_antialias,
            )
            if self.with_cls_token:
                cls_token = cls_token + self.pos_embed[:, :1]
        if not self.num_prefix_tokens:
            return x
        prefix = [y.expand(x.shape[0], -1, -1) for y in (cls_token, self.reg_token) if y is not None]
        return torch.cat([*prefix, x.flatten(1, 2)], 1)

    def stage_maps(self, x: Tensor) -> Iterator[Tuple[Tensor, Optional[Tensor]]]:
        for tokens, size in self._block_outputs(x):
            yield self._split(tokens, size)

    def _block_outputs(self, x: Tensor) -> Iterator[Tuple[Tensor, Sequence[int]]]:
        """Yields the output of each block, (B, H', W', C) or (B, P + H' * W', C) with prefix tokens, and (H', W')."""
        x = self.patch_embed(x)  # (B, H', W', C)
        size = x.shape[1:3]
        x = self.norm_pre(self._pos_embed(x))
        rope = None
        for i, block in enumerate(self.blocks):
            if self.rope is not None and (i == 0 or self.rope.is_mixed):  # one rotation for all blocks, or for each
                rope = self.rope(size, i)
            x = block(x) if rope is None else block(x, rope)
            yield x, size

    def _split(self, x: Tensor, size: Sequence[int]) -> Tuple[Tensor, Optional[Tensor]]:
        """Returns the map of (B, H', W', C), and the prefix tokens of (B, P, C) or None."""
        num_prefix = self.num_prefix_tokens
        return (x[:, num_prefix:].unflatten(1, size), x[:, :num_prefix]) if num_prefix else (x, None)

    def output_norm(self, index: int) -> nn.Module:
        """Returns the last norm for the very last block, or for all if ``norm_outputs``; an identity for others."""
        return self.norm if self.norm_outputs or index == self.arch['num_layers'] - 1 else self.no_norm

    def intermediate_norm(self, index: int) -> nn.Module:
        """Returns the last norm for every block, as timm does."""
        return self.norm

    def forward(self, x: Tensor) -> Tuple[Union[Tensor, Tuple[Tensor, Tensor]], ...]:
        """Computes the maps, tokens or means of the blocks in ``out_indices``.

        Args:
            x: Images, (B, ``in_channels``, H, W), H and W at least one patch.

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
            y, prefix = self._split(out, size)
            if self.out_type == 'cls_token':
                outs.append(prefix[:, 0])
            elif self.out_type == 'avg_featmap':
                outs.append(self.fc_norm(y.mean((1, 2))))
            elif self.out_type == 'raw':
                outs.append(out if self.num_prefix_tokens else out.flatten(1, 2))
            else:
                feature_map = y.permute(0, 3, 1, 2).contiguous()
                outs.append((feature_map, prefix[:, 0]) if self.output_cls_token else feature_map)
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        num_depths = self.arch['num_layers'] + 2
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        part, *rest = param_name[len(prefix) :].split('.')
        # Residual convolutions, which no classifier has, belong to the last depth. Mixed rotary frequencies are one
        # parameter of all blocks and have the depth of positions.
        if part in ('norm', 'fc_norm') or 'residual' in rest:
            return num_depths - 1, num_depths
        depth = int(rest[0]) + 1 if part == 'blocks' else 0
        return depth, num_depths

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Infers the config.

        Metadata of checkpoints of this package tell what shapes do not, see :mod:`.vit_weights`. Without it these
        values are assumed: the number of heads (:func:`.infer_plain_arch`), windows and global blocks
        (:func:`.infer_windows`), and the grid nearest to a square with the type of rotary positions
        (:func:`.infer_positions`).
        """
        metadata = backbone_metadata(state_dict) or {}
        arch, assumed = infer_plain_arch(state_dict, cls.arch_zoo, metadata.pop('num_heads', None))
        num_layers = arch['num_layers']
        options = infer_options(state_dict, num_layers)
        cfg = dict(type=cls.__name__, arch=cls.variant_name(arch), **options)
        window_size, global_blocks, global_grid, is_certain = infer_windows(state_dict, num_layers, metadata)
        windows = dict(window_size=window_size, global_attn_indexes=global_blocks)
        if not is_certain:
            assumed.update(windows)
        if 'blocks.0.attn.rel_pos_h' in state_dict:
            cfg['use_rel_pos'] = True
        patch_size = to_2tuple(options.get('patch_size', 16))
        positions, assumed_positions = infer_positions(
            state_dict, patch_size, global_grid, metadata.pop('pos_embed_grid', None)
        )
        cfg.update(positions)
        assumed.update(assumed_positions)
        for name in metadata:  # what a file tells is not assumed
            assumed.pop(name, None)
        for name, value in {**metadata, **windows}.items():
            if name in DEFAULTS and (name in cfg or value != DEFAULTS[name]):
                cfg[name] = value
        return cfg, assumed

    @classmethod
    def variant_name(cls, arch: Dict[str, Any]) -> Union[str, Dict[str, Any]]:
        """Returns the name of the published variant, or ``arch`` if there is none."""
        return next((name for name, variant in cls.arch_zoo.items() if variant == arch), arch)

    @classmethod
    def arch_of(cls, cfg: Dict[str, Any]) -> Dict[str, Any]:
        """Returns the arch of a config as a dict."""
        return cfg['arch'] if isinstance(cfg['arch'], dict) else cls.arch_zoo[cfg['arch']]

    @property
    def metadata(self) -> Dict[str, Any]:
        """Arguments that shapes do not tell; ``state_dict`` carries them, and checkpoints of this package with it."""
        return dict(
            num_heads=self.arch['num_heads'],
            pos_embed_grid=self.pos_embed_grid,
            window_size=self.window_size,
            global_attn_indexes=self.global_attn_indexes,
            **{name: getattr(self, name) for name in METADATA},
        )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Fits positions and patches of a checkpoint, and drops tokens that the model has no place for."""
        # Before tokens are dropped: their presence tells whether the table has a place for the class token.
        if self.pos_embed is not None:
            self._fit_pos_embed(state_dict, prefix, local_metadata.get(METADATA_KEY, {}).get('pos_embed_grid'))
        if self.cls_token is None and state_dict.pop(f'{prefix}cls_token', None) is not None:
            print_log(f'{self._get_name()}: dropped the class token of the checkpoint', logger='current')
        if self.window_size and state_dict.pop(f'{prefix}reg_token', None) is not None:
            print_log(f'{self._get_name()}: dropped the registers of the checkpoint', logger='current')
        freqs = state_dict.get(f'{prefix}rope.freqs')
        if freqs is not None and freqs.dim() == 4:  # (2, num_layers, num_heads, head_dim / 2), also of later blocks
            state_dict[f'{prefix}rope.freqs'] = freqs[:, : len(self.blocks)]
        if self.rope is not None:  # files of other sources lack its buffers
            for name, buffer in self.rope.named_buffers():
                state_dict.setdefault(f'{prefix}rope.{name}', buffer)
        self._fit_patch_embed(state_dict, f'{prefix}patch_embed.proj.weight')
        own = self.arch['num_heads']
        loaded = local_metadata.get(METADATA_KEY, {}).get('num_heads', own)
        if loaded != own:
            error_msgs = args[-1]
            error_msgs.append(f'the weights belong to num_heads={loaded}, the model has num_heads={own}')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _fit_patch_embed(self, state_dict: Dict[str, Tensor], key: str) -> None:
        """Resamples the patch embedding of another patch size (FlexiViT, https://arxiv.org/abs/2212.08013)."""
        loaded = state_dict.get(key)
        if not isinstance(self.patch_embed, PatchEmbed) or loaded is None or loaded.dim() != 4:
            return
        old, new = tuple(loaded.shape[2:]), self.patch_embed.patch_size
        if old != new:
            state_dict[key] = resample_patch_embed(loaded, list(new))
            print_log(
                f'{self._get_name()}: resampled patches from {old[0]} x {old[1]} to {new[0]} x {new[1]} pixels',
                logger='current',
            )

    def _fit_pos_embed(self, state_dict: Dict[str, Tensor], prefix: str, grid: Optional[Sequence[int]]) -> None:
        """Resizes positions that were learned for another grid, and adds or drops the place of the class token.

        Args:
            state_dict: State dict, which is changed.
            prefix: Prefix of the backbone's keys.
            grid: (H, W) that the positions were learned for, if the checkpoint tells. Otherwise they have the ratio of
                the model's grid, or else they are square.
        """
        key = f'{prefix}pos_embed'
        loaded = state_dict.get(key)
        if loaded is None or loaded.dim() != 3:
            return
        name, own_grid = self._get_name(), self.pos_embed_grid
        num_positions, own_num_positions = loaded.shape[1], self.pos_embed.shape[1]
        num_cls = int(f'{prefix}cls_token' in state_dict)
        if num_cls and f'{prefix}reg_token' in state_dict:
            # Beside registers, a table has H * W rows in timm and 1 + H * W in this package, under the same key. A
            # known grid decides. Else a length equal to ours is read like ours, another square number as patches alone,
            # and any other as 1 + patches. Converted files have the row; this is for load_state_dict.
            is_other_square = (
                grid is None and num_positions != own_num_positions and math.isqrt(num_positions) ** 2 == num_positions
            )
            num_cls = int(not is_other_square and num_positions != math.prod(grid or own_grid))
        num_patches, patches = num_positions - num_cls, loaded[:, num_cls:]
        loaded_grid = tuple(grid) if grid is not None else fit_grid(num_patches, own_grid)
        if loaded_grid is None or math.prod(loaded_grid) != num_patches:
            return  # reported as a mismatch
        if grid is None and loaded_grid[0] != loaded_grid[1] and math.isqrt(num_patches) ** 2 == num_patches:
            print_log(
                f'{name}: took {num_patches} positions as {loaded_grid[0]} x {loaded_grid[1]}, the ratio of the model; '
                'the checkpoint does not tell it',
                logger='current',
                level=logging.WARNING,
            )
        if loaded_grid != own_grid:
            patches = resize_pos_embed(
                patches, loaded_grid, own_grid, self.interpolate_offset, self.interpolate_antialias
            ).flatten(1, 2)
            sizes = [f'{height} x {width}' for height, width in (loaded_grid, own_grid)]
            print_log(f'{name}: resized positions from {sizes[0]} to {sizes[1]}', logger='current')
        if not self.with_cls_token:
            state_dict[key] = patches
        elif num_cls:
            state_dict[key] = torch.cat([loaded[:, :1], patches], 1)
        else:
            state_dict[key] = torch.cat([torch.zeros_like(loaded[:, :1]), patches], 1)


# Defaults of PlainViT's arguments. ViTAE is compared with checkpoints by them, too, and lacks most of the arguments.
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(PlainViT).parameters.items()}


def _widths(arch: Dict[str, Any]) -> Tuple[int, int]:
    """Returns the channels of blocks and of the hidden layer of their MLP."""
    return arch['embed_dims'], round(arch['embed_dims'] * arch['mlp_ratio'])


def _grid(img_size: Sequence[int], patch_size: Sequence[int]) -> Tuple[int, int]:
    """Returns the grid (H, W) of patches that cover an image."""
    return tuple(ceil_div(*sides) for sides in zip(img_size, patch_size))
