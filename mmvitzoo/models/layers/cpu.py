"""Faster float32 inference on a CPU, by one explicit call: :func:`optimize_for_inference`.

The models do not depend on this file. Measured gains are in docs/performance.md.
"""

from collections import Counter
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn.utils import fuse_conv_bn
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd import forward_ad

from .attention import RelPosAttention, rel_pos_attention_flash, split_heads
from .compiling import is_compiling
from .conv import ConvRelativePosition, DepthwiseConv
from .layer_scale import LayerScale
from .padding import ceil_div
from .rel_pos import rel_pos_scores

# Chunk sizes in elements: hidden activations of an MLP, and the bias of attention. A chunk stays in the cache of the
# processor, and its memory is used again for the next.
HIDDEN_ELEMENTS = 2**22
BIAS_ELEMENTS = 2**22
ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def optimize_for_inference(model: nn.Module, dtype: Optional[torch.dtype] = None) -> nn.Module:
    """Swaps layers of a model in place for faster inference on a CPU.

    Linear layers run in oneDNN, MLPs and relative position biases are computed in chunks, position convolutions of
    MPViT are merged, BatchNorm is folded into convolutions and layer scale into linear layers. In float32 outputs
    differ by rounding alone. A second call changes nothing.

    Load the weights first: keys of the state dict change, and split, merged and folded weights are copies. The model
    cannot be trained afterwards: its ``train`` raises RuntimeError. Linear layers with forward hooks are left as they
    are; hooks on a replaced MLP or position convolution are lost. Where gradients are needed, under autocast and under
    ``torch.compile``, the new layers use PyTorch's standard operators.

    Args:
        model: A backbone of this package or any model with one, such as a detector, on a CPU in eval mode.
        dtype: ``torch.bfloat16`` computes the linear layers in bfloat16, which is fast on processors with AMX or
            AVX512-BF16; maps then differ by about 1%. None keeps float32.

    Returns:
        ``model``.

    Raises:
        ValueError: The model is in training mode or not on a CPU, or another ``dtype``.
    """
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f'optimize_for_inference needs a model in eval mode, but {training[0]} is in training mode')
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices - {'cpu'}:
        raise ValueError(f'optimize_for_inference needs a model on a CPU, got one on {", ".join(sorted(devices))}')
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f'optimize_for_inference: dtype is None or torch.bfloat16, got {dtype}')
    _fold_batch_norms(model)
    _fold_layer_scales(model)
    _swap_layers(model, dtype)
    return model.eval()  # also the new layers


def _fold_batch_norms(model: nn.Module) -> None:
    modules = model.named_modules(remove_duplicate=False)
    uses = Counter(module for _, module in modules if isinstance(module, nn.Conv2d))
    # Heads that share convolutions between levels with norms of their own, as RTMDet's, cannot be folded.
    shared = any(count > 1 for count in uses.values())
    backbones = [module for module in model.modules() if hasattr(module, 'family')]
    for module in backbones if shared else [model]:
        fuse_conv_bn(module)


def _fold_layer_scales(model: nn.Module) -> None:
    """Multiplies layer scale into the last linear layer of its branch."""
    for block in model.modules():
        for name, branch, layer in (('ls1', 'attn', 'proj'), ('ls2', 'mlp', 'fc2')):
            scale = getattr(block, name, None)
            linear = getattr(getattr(block, branch, None), layer, None)
            if isinstance(scale, LayerScale) and linear is not None and _is_plain(linear, nn.Linear):
                linear.weight = nn.Parameter(
                    linear.weight.detach() * scale.gamma.detach()[:, None], requires_grad=False
                )
                linear.bias = nn.Parameter(linear.bias.detach() * scale.gamma.detach(), requires_grad=False)
                setattr(block, name, nn.Identity())


def _swap_layers(parent: nn.Module, dtype: Optional[torch.dtype]) -> None:
    for name, layer in list(parent.named_children()):
        if isinstance(layer, RelPosAttention):
            layer.rel_pos_kernel = rel_pos_attention_biased
        _swap_qkv(layer, dtype)
        if _is_plain(layer, nn.Linear):
            setattr(parent, name, OneDNNLinear(layer, dtype))
        elif _is_plain_mlp(layer):
            setattr(parent, name, ChunkedMlp(layer, dtype))
        elif type(layer) is ConvRelativePosition:
            setattr(parent, name, MergedConvRelativePosition(layer))
        else:
            _swap_layers(layer, dtype)


def _swap_qkv(attn: nn.Module, dtype: Optional[torch.dtype]) -> None:
    """Replaces the layer qkv, and the method that applies it, by a module."""
    for method, layer in (('split_qkv', SplitQKV), ('pooled_qkv', PooledQKV)):
        if hasattr(attn, method) and hasattr(attn, 'qkv') and _is_plain(attn.qkv, nn.Linear):
            attn.qkv_projection = layer(attn, dtype)  # registers its weights
            # Hides the method of the class. A submodule of that name would not: methods are found first.
            attn.__dict__[method] = attn.qkv_projection
            del attn.qkv


def _is_plain(module: nn.Module, kind: type) -> bool:
    """Returns whether a layer is of this very class, without hooks, adapters or parametrizations."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return type(module) is kind and not any(hooks) and 'weight' in module._parameters


def _is_plain_mlp(module: nn.Module) -> bool:
    return (
        type(module) is Mlp
        and _is_plain(module.fc1, nn.Linear)
        and _is_plain(module.fc2, nn.Linear)
        and type(module.act) is nn.GELU
        and module.act.approximate == 'none'
        and type(module.norm) is nn.Identity
    )


def _is_inference(x: Tensor, *parameters: Optional[Tensor]) -> bool:
    """Returns whether operators without derivatives may be used.

    No gradient is needed, and no autocast, compiler or tracer is active.
    """
    needs_grad = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *parameters))
    return not (needs_grad or forward_ad._current_level >= 0 or is_compiling() or torch.is_autocast_cpu_enabled())


class InferenceLayer(nn.Module):
    """Base of the new layers, which are not for training."""

    def train(self, mode: bool = True) -> nn.Module:
        """Sets eval mode; raises RuntimeError for training mode."""
        if mode:
            raise RuntimeError(
                'a model cannot be trained after optimize_for_inference, which merges and copies weights; build it anew'
            )
        return super().train(mode)


class OneDNNLinear(InferenceLayer, nn.Linear):
    """``nn.Linear`` in oneDNN, with an exact GELU if asked for.

    PyTorch hands float32 products to MKL, which is slower on many processors. oneDNN also applies the GELU while the
    results are still in the cache.

    Args:
        linear: Layer to replace, whose parameters are used.
        dtype: Type of the computation, None for that of the layer.
        gelu: Apply the GELU (https://arxiv.org/abs/1606.08415).
    """

    def __init__(self, linear: nn.Linear, dtype: Optional[torch.dtype] = None, gelu: bool = False):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device='meta')
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        if dtype is not None:
            self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
            if linear.bias is not None:
                self.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        dtype = x.dtype
        x = x.to(self.weight.dtype)
        supported = x.dtype in ONEDNN_DTYPES and x.numel() > 0 and x.shape[-1] == self.in_features
        if supported and _is_inference(x, self.weight, self.bias):
            gelu = 'gelu' if self.gelu else 'none'
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, gelu, [], 'none').to(dtype)
        x = super().forward(x)
        return (F.gelu(x) if self.gelu else x).to(dtype)


class ChunkedMlp(InferenceLayer):
    """MLP of two :class:`OneDNNLinear` that computes :data:`HIDDEN_ELEMENTS` hidden elements at a time.

    Args:
        mlp: Layer to replace, whose parameters are used.
        dtype: Type of the computation, None for that of the layer.
    """

    def __init__(self, mlp: Mlp, dtype: Optional[torch.dtype] = None):
        super().__init__()
        self.fc1 = OneDNNLinear(mlp.fc1, dtype, gelu=True)
        self.fc2 = OneDNNLinear(mlp.fc2, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        if not _is_inference(x, *self.parameters()):
            return self.fc2(self.fc1(x))
        tokens = x.flatten(0, -2)
        num_chunks = max(ceil_div(len(tokens) * self.fc1.out_features, HIDDEN_ELEMENTS), 1)
        out = [self.fc2(self.fc1(chunk)) for chunk in tokens.chunk(num_chunks)]
        return (out[0] if num_chunks == 1 else torch.cat(out)).unflatten(0, x.shape[:-1])


class SplitQKV(InferenceLayer):
    """Queries, keys and values by a linear layer each, so that each of the three is contiguous.

    Args:
        attn: Attention layer with ``qkv`` and ``num_heads``, whose parameters are used.
        dtype: Type of the computation, None for that of the layer.
    """

    def __init__(self, attn: nn.Module, dtype: Optional[torch.dtype] = None):
        super().__init__()
        self.num_heads = attn.num_heads
        self.linears = nn.ModuleList()
        biases = [None] * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        for weight, bias in zip(attn.qkv.weight.chunk(3), biases):
            linear = nn.Linear(attn.qkv.in_features, len(weight), bias is not None, device='meta')
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
            self.linears.append(OneDNNLinear(linear, dtype))

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """(B, ..., C) -> three of (B, heads, N, head_dim)."""
        return tuple(split_heads(linear(x), self.num_heads) for linear in self.linears)


class PooledQKV(SplitQKV):
    """Pooled queries, keys and values of MViTv2, by convolutions with a kernel repeated for all heads.

    The heads are rearranged after pooling, not before it.

    Args:
        attn: A :class:`mmvitzoo.models.backbones.mvitv2.PoolingAttention`, whose parameters are used.
        dtype: Type of the computation, None for that of the layer.
    """

    def __init__(self, attn: nn.Module, dtype: Optional[torch.dtype] = None):
        super().__init__(attn, dtype)
        self.convs = nn.ModuleList()
        for pool in (attn.pool_q, attn.pool_k, attn.pool_v):
            dim = pool.out_channels * attn.num_heads
            conv = DepthwiseConv(dim, pool.kernel_size[0], pool.stride[0], bias=False)
            conv.weight = nn.Parameter(pool.weight.detach().repeat(attn.num_heads, 1, 1, 1), requires_grad=False)
            self.convs.append(conv)
        self.norms = nn.ModuleList([attn.norm_q, attn.norm_k, attn.norm_v])

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """(B, H, W, C) -> three maps of (B * heads, H', W', head_dim)."""
        maps = []
        for linear, conv, norm in zip(self.linears, self.convs, self.norms):
            y = norm(conv(linear(x)).unflatten(-1, (self.num_heads, -1)))  # (B, H', W', heads, head_dim)
            maps.append(y.permute(0, 3, 1, 2, 4).flatten(0, 1))
        return tuple(maps)


class MergedConvRelativePosition(InferenceLayer):
    """:class:`.ConvRelativePosition` as one convolution by the largest kernel, without splitting and joining.

    Args:
        crpe: Layer to replace.
    """

    def __init__(self, crpe: ConvRelativePosition):
        super().__init__()
        self.radius = max(conv.padding[0] for conv in crpe.convs)
        with torch.no_grad():
            kernels = [F.pad(conv.weight, (self.radius - conv.padding[0],) * 4) for conv in crpe.convs]
            self.weight = nn.Parameter(torch.cat(kernels), requires_grad=False)
            self.bias = nn.Parameter(torch.cat([conv.bias for conv in crpe.convs]), requires_grad=False)

    def forward(self, v: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        v = v.permute(0, 3, 1, 2)
        return F.conv2d(v, self.weight, self.bias, padding=self.radius, groups=len(self.bias)).permute(0, 2, 3, 1)


def rel_pos_attention_biased(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """:func:`.rel_pos_attention_flash` with a bias on the scores, in chunks of :data:`BIAS_ELEMENTS`.

    The bias is cheaper than longer queries and keys, and a fused kernel takes it if it needs no gradient. A chunk
    is at least one row of queries of one head.

    Args:
        q: (B, heads, Hq * Wq, C).
        k: (B, heads, H * W, C).
        v: (B, heads, H * W, C).
        rel_h: (Hq, H, C).
        rel_w: (Wq, W, C).

    Returns:
        (B, heads, Hq * Wq, C).
    """
    if not _is_inference(q, k, v, rel_h, rel_w):
        return rel_pos_attention_flash(q, k, v, rel_h, rel_w)
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    q_map = q.unflatten(2, (rel_h.shape[0], rel_w.shape[0]))
    out = torch.empty_like(q_map)
    batch_step = max(BIAS_ELEMENTS // (num_queries * num_keys), 1)
    row_step = max(BIAS_ELEMENTS // (len(rel_w) * num_keys), 1)
    bias = q.new_empty(0)
    for i in range(0, batch, batch_step):
        for head in range(heads):
            index = (slice(i, i + batch_step), slice(head, head + 1))
            for row in range(0, len(rel_h), row_step):
                chunk = slice(row, row + row_step)
                q_chunk = q_map[(*index, chunk)]  # (b, 1, rows, Wq, C)
                h, w = rel_pos_scores(q_chunk, rel_h[chunk], rel_w)  # (b, 1, rows, Wq, H) and (b, 1, rows, Wq, W)
                if bias.shape[:-1] != h.shape:  # otherwise the memory of the last chunk serves again
                    bias = h.new_empty(*h.shape, w.shape[-1])
                torch.add(h[..., None], w[..., None, :], out=bias)  # (b, 1, rows, Wq, H, W)
                mask = bias.flatten(-2).flatten(2, 3)  # (b, 1, rows * Wq, H * W)
                result = F.scaled_dot_product_attention(q_chunk.flatten(2, 3), k[index], v[index], attn_mask=mask)
                out[(*index, chunk)] = result.view(q_chunk.shape)
    return out.flatten(2, 3)
