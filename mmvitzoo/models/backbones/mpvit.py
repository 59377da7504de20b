"""MPViT: Multi-Path Vision Transformer for Dense Prediction.

Lee et al., CVPR 2022, https://arxiv.org/abs/2112.11010

A convolutional stem at stride 4 precedes four stages at strides 4, 8, 16 and 32. A stage embeds its input by a chain
of depthwise separable convolutions. The n-th path reads the map after the n-th of them, so that the paths see patches
of 3 x 3, 5 x 5 and 7 x 7 at the cost of shared 3 x 3 kernels. Each path is a transformer whose attention is linear in
the number of tokens. A convolutional branch runs in parallel, and a 1 x 1 convolution aggregates all.

Maps are (B, C, H, W) in channels-last memory around convolutions and (B, H, W, C) views of it in the transformers, so
that no copy is needed in between.
"""

from itertools import islice
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from einops import rearrange
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmengine.registry import MODELS
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import ConvRelativePosition, DepthwiseConv, at_least_float32, split_heads
from .base import AttentionLayer, Backbone, count_weights, drop_path_rates, match_variant, weight_shape

# torch.fx records a call of a wrapped function instead of tracing its branches.
torch.fx.wrap('factorized_attention')

NUM_STAGES = 4
# Of 8 heads, 2 have relative positions by kernels of 3 x 3, 3 by 5 x 5 and 3 by 7 x 7.
KERNEL_HEADS = {3: 2, 5: 3, 7: 3}
NUM_HEADS = sum(KERNEL_HEADS.values())


class FactorizedAttention(nn.Module):
    """Attention of CoaT (https://arxiv.org/abs/2104.06399), whose cost is linear in the number of tokens.

    ``q @ (softmax(k)^T @ v) * head_dim**-0.5 + q * CRPE(v)``, the softmax over tokens.

    Args:
        dim: Channels, a multiple of 8.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.scale = (dim // NUM_HEADS) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, crpe: nn.Module) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); ``crpe`` is shared by the blocks of the encoder, which owns it."""
        q, k, v = self.qkv(x).chunk(3, -1)  # (B, H, W, C)
        content = factorized_attention(q, k, v, self.scale)
        return self.proj(torch.addcmul(content, q, crpe(v)))

    def attention_weights(self, x: Tensor, window: int, token: int) -> Tensor:
        """Returns the factors of the values for one query, of either sign.

        Args:
            x: Input of ``forward``, (1, H, W, C).
            window: 0, the attention is global.
            token: Index of the query.

        Returns:
            (heads, N).
        """
        q, k, _ = (y.flatten(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = split_heads(q, NUM_HEADS), split_heads(k.softmax(1), NUM_HEADS)
        return self.scale * (k @ q[:, :, token, :, None])[0, ..., 0]


def factorized_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``q @ (softmax(k)^T @ v) * scale`` in each head, the softmax over tokens; all are (B, H, W, C)."""
    # At least float32: over many tokens the softmax is smaller than half precision can represent.
    with torch.autocast(q.device.type, enabled=False):
        k = split_heads(at_least_float32(k.flatten(1, 2)).softmax(1), NUM_HEADS)  # (B, heads, N, head_dim)
        context = scale * (k.transpose(2, 3) @ split_heads(at_least_float32(v), NUM_HEADS))
    content = split_heads(q, NUM_HEADS) @ context.to(q.dtype)
    return rearrange(content, 'b heads (h w) c -> b h w (heads c)', h=q.shape[1])


class PathBlock(nn.Module):
    """Pre-norm transformer block with position encodings of the encoder.

    Args:
        dim: Channels, a multiple of 8.
        mlp_ratio: Hidden width of the MLP divided by ``dim``.
        drop_path: Stochastic depth rate.
        with_cp: Use activation checkpointing.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, with_cp: bool):
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = FactorizedAttention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cpe: nn.Module, crpe: nn.Module) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); ``cpe`` and ``crpe`` are the absolute and relative position encodings."""

        def inner_forward(x: Tensor) -> Tensor:
            x = x + cpe(x)
            x = x + self.drop_path(self.attn(self.norm1(x), crpe))
            return x + self.drop_path(self.mlp(self.norm2(x)))

        if self.with_cp and self.training:
            return checkpoint(inner_forward, x, use_reentrant=False)
        return inner_forward(x)


class Encoder(nn.Module):
    """Path of blocks that share one absolute (CPE) and one relative (CRPE) position encoding.

    Args:
        dim: Channels, a multiple of 8.
        mlp_ratio: Hidden width of the MLPs divided by ``dim``.
        drop_paths: Stochastic depth rate of each block.
        with_cp: Use activation checkpointing.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_paths: Sequence[float], with_cp: bool):
        super().__init__()
        self.cpe = DepthwiseConv(dim, 3)
        self.crpe = ConvRelativePosition(dim, KERNEL_HEADS)
        self.blocks = nn.ModuleList(PathBlock(dim, mlp_ratio, rate, with_cp) for rate in drop_paths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x, self.cpe, self.crpe)
        return x.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Multi-scale patch embedding, parallel paths, local branch and their aggregation.

    Args:
        dim: Channels of the input and of the paths, a multiple of 8.
        out_channels: Channels of the output.
        stride: Stride of the patch embedding.
        num_paths: Number of paths.
        mlp_ratio: Hidden width of the MLPs divided by ``dim``.
        drop_paths: Stochastic depth rate of each block of a path.
        norm_cfg: Norm config of the convolutions.
        with_cp: Use activation checkpointing in transformer blocks.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        stride: int,
        num_paths: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        norm_cfg: dict,
        with_cp: bool,
    ):
        super().__init__()
        conv_cfg = dict(bias=False, norm_cfg=norm_cfg, act_cfg=dict(type='HSwish'))
        self.patch_embeds = nn.ModuleList(
            DepthwiseSeparableConvModule(
                dim, dim, 3, stride if i == 0 else 1, padding=1, dw_norm_cfg=None, dw_act_cfg=None, **conv_cfg
            )
            for i in range(num_paths)
        )
        self.local = nn.Sequential(
            ConvModule(dim, dim, 1, **conv_cfg),
            ConvModule(dim, dim, 3, padding=1, groups=dim, **conv_cfg),
            ConvModule(dim, dim, 1, **dict(conv_cfg, act_cfg=None)),
        )
        self.paths = nn.ModuleList(Encoder(dim, mlp_ratio, drop_paths, with_cp) for _ in range(num_paths))
        self.aggregate = ConvModule((num_paths + 1) * dim, out_channels, 1, **conv_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        embedded = []
        for patch_embed in self.patch_embeds:
            x = patch_embed(x)
            embedded.append(x)
        outs = [embedded[0] + self.local(embedded[0])]
        outs += [path(x) for path, x in zip(self.paths, embedded)]
        return self.aggregate(torch.cat(outs, dim=1))


@MODELS.register_module()
class MPViT(Backbone):
    """Multi-Path Vision Transformer (https://arxiv.org/abs/2112.11010).

    Maps of stages 0 to 3 have strides 4, 8, 16 and 32. The aggregation of a stage already widens to the width of the
    next stage: the maps of MPViT-S have 128, 216, 288 and 288 channels. See :class:`.Backbone` for the arguments that
    all backbones share.

    Args:
        arch: ``'tiny'``, ``'xsmall'``, ``'small'``, ``'base'``, or a dict of four-element sequences ``num_paths``,
            ``num_layers``, ``embed_dims`` (multiples of 8: the paper always has 8 heads) and ``mlp_ratios``.
        out_indices: Stages from 0 to 3 whose maps are returned.
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1).
        norm_cfg: Norm config of the convolutions, for :func:`mmcv.cnn.build_norm_layer`.
        frozen_stages: -1 trains everything, 0 freezes the stem, k also the first k stages.
        norm_eval: Keep every BatchNorm in eval mode during training.
        with_cp: Use activation checkpointing of transformer blocks in training.
        init_cfg: Initialization config of MMEngine.
        pretrained: Path or address of a checkpoint, short for ``init_cfg``.
        in_channels: Channels of the images, see :class:`.Backbone`.

    Raises:
        ValueError: An argument is outside these ranges; the message says what is allowed.

    Examples:
        >>> import torch
        >>> from mmvitzoo.models import MPViT
        >>> model = MPViT('tiny').eval()
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 176, 8, 12), (1, 216, 4, 6), (1, 216, 2, 3)]
    """

    family = 'mpvit'
    arch_zoo = {
        'tiny': dict(
            num_paths=(2, 3, 3, 3), num_layers=(1, 2, 4, 1), embed_dims=(64, 96, 176, 216), mlp_ratios=(2, 2, 2, 2)
        ),
        'xsmall': dict(
            num_paths=(2, 3, 3, 3), num_layers=(1, 2, 4, 1), embed_dims=(64, 128, 192, 256), mlp_ratios=(4, 4, 4, 4)
        ),
        'small': dict(
            num_paths=(2, 3, 3, 3), num_layers=(1, 3, 6, 3), embed_dims=(64, 128, 216, 288), mlp_ratios=(4, 4, 4, 4)
        ),
        'base': dict(
            num_paths=(2, 3, 3, 3), num_layers=(1, 3, 8, 3), embed_dims=(128, 224, 368, 480), mlp_ratios=(4, 4, 4, 4)
        ),
    }
    first_convs = ('stem.0.conv',)

    def __init__(
        self,
        arch: Union[str, Dict[str, Sequence]] = 'tiny',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        norm_cfg: dict = dict(type='BN'),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Optional[Union[dict, list]] = None,
        pretrained: Optional[str] = None,
        in_channels: int = 3,
    ):
        super().__init__(
            arch, NUM_STAGES, out_indices, drop_path_rate, frozen_stages, norm_eval, init_cfg, pretrained, in_channels
        )
        self._check_flags(norm_eval=norm_eval, with_cp=with_cp)
        for key, values in self.arch.items():
            self._check_stages(key, values, NUM_STAGES, (int, float) if key == 'mlp_ratios' else int)
        dims = tuple(self.arch['embed_dims'])
        if any(dim % NUM_HEADS for dim in dims):
            self._fail(f'embed_dims are multiples of {NUM_HEADS}, got {dims}')
        if norm_cfg is not None:
            self._check_norm_cfg(norm_cfg)

        conv_cfg = dict(stride=2, padding=1, bias=False, norm_cfg=norm_cfg, act_cfg=dict(type='HSwish'))
        self.stem = nn.Sequential(
            ConvModule(in_channels, dims[0] // 2, 3, **conv_cfg), ConvModule(dims[0] // 2, dims[0], 3, **conv_cfg)
        )
        num_layers = self.arch['num_layers']
        rates = iter(drop_path_rates(drop_path_rate, sum(num_layers)))
        self.out_channels = dims[1:] + dims[-1:]
        self.stages = nn.ModuleList(
            Stage(
                dim=dims[i],
                out_channels=self.out_channels[i],
                stride=1 if i == 0 else 2,
                num_paths=self.arch['num_paths'][i],
                mlp_ratio=self.arch['mlp_ratios'][i],
                drop_paths=list(islice(rates, num_layers[i])),
                norm_cfg=norm_cfg,
                with_cp=with_cp,
            )
            for i in range(self.out_indices[-1] + 1)
        )
        self.finish_init()

    def stages_to_freeze(self) -> List[List[Union[nn.Module, nn.Parameter]]]:
        return [[self.stem], *([stage] for stage in self.stages)]

    def attention_layers(self) -> List[AttentionLayer]:
        """Returns the attention of each block of each path; parallel blocks have one index."""
        layers: List[AttentionLayer] = []
        for i, stage in enumerate(self.stages):
            first = layers[-1].block + 1 if layers else 0
            for block in range(len(stage.paths[0].blocks)):
                for path, encoder in enumerate(stage.paths):
                    side = 2 * path + 3
                    attn, stride = encoder.blocks[block].attn, self.strides[i]
                    layers.append(AttentionLayer(first + block, i, f'path {side} x {side}', attn, stride, stride))
        return layers

    def stage_maps(self, x: Tensor) -> Iterator[Tuple[Tensor, Optional[Tensor]]]:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
            yield x.permute(0, 2, 3, 1), None

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        # Parallel blocks share a depth. Patch embedding, local branch and position encodings belong to the first block
        # of their stage, the aggregation to the last.
        num_layers = self.arch['num_layers']
        num_depths = sum(num_layers) + 2
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        part, stage, *rest = param_name[len(prefix) :].split('.')
        if part == 'stem':
            return 0, num_depths
        first = 1 + sum(num_layers[: int(stage)])
        if rest[0] == 'aggregate':
            return first + num_layers[int(stage)] - 1, num_depths
        block = int(rest[3]) if rest[2] == 'blocks' else 0
        return first + block, num_depths

    @classmethod
    def infer_cfg(cls, state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        arch: Dict[str, tuple] = dict.fromkeys(cls.arch_zoo['tiny'], ())
        num_stages = count_weights(state_dict, 'stages.{}.paths.0.cpe.weight')
        for stage in range(num_stages):
            blocks = f'stages.{stage}.paths.0.blocks'
            hidden_dim, dim = weight_shape(state_dict, f'{blocks}.0.mlp.fc1.weight', 2)
            arch['num_paths'] += (count_weights(state_dict, f'stages.{stage}.paths.{{}}.cpe.weight'),)
            arch['num_layers'] += (count_weights(state_dict, f'{blocks}.{{}}.norm1.weight'),)
            arch['embed_dims'] += (dim,)
            arch['mlp_ratios'] += (hidden_dim / dim,)
        cfg = dict(type=cls.__name__, arch=match_variant(cls.arch_zoo, arch, num_stages))
        cfg.update(cls.infer_in_channels(state_dict))
        if num_stages < 4:
            cfg['out_indices'] = tuple(range(num_stages))
        return cfg, {}
