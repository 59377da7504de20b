"""Changes of values between layouts of plain ViTs, in both directions. Keys are those of this package."""

import math
import re
from typing import Any, Callable, Dict, List

import torch
from torch import Tensor

from ...models.backbones.base import weight_shape
from ...models.backbones.vit_weights import backbone_metadata, is_gated
from ..reading import CheckpointError

# Buffers of rotary positions: timm computes them itself.
ROTARY_BUFFERS = ('backbone.rope.periods', 'backbone.rope.grid')


def steps(*functions: Callable[[Dict[str, Tensor], Dict[str, str]], None]) -> Callable[..., None]:
    """Returns a function that applies several changes in order, for :attr:`.Layout.postprocess`."""

    def apply(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
        for function in functions:
            function(state_dict, dropped)

    return apply


def export_steps(*functions: Callable[[Dict[str, Tensor]], Dict[str, Tensor]]) -> Callable[..., Dict[str, Tensor]]:
    """Returns a function that applies several changes in order, for :attr:`.Layout.preprocess_export`."""

    def apply(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        for function in functions:
            state_dict = function(dict(state_dict))
        return state_dict

    return apply


def _parents(state_dict: Dict[str, Tensor], pattern: str) -> List[str]:
    """Returns what comes before the suffix ``pattern``, a regular expression, in the keys that end with it."""
    found = (re.fullmatch(f'(.*){pattern}', key) for key in state_dict)
    return list(dict.fromkeys(match[1] for match in found if match))


def _join(state_dict: Dict[str, Tensor], keys: List[str], target: str, num_dims: int) -> None:
    """Concatenates tensors of equal shapes, along the first dimension, to a new one."""
    if target in state_dict:
        raise ValueError(f'{target} is there beside {keys[0]}')
    shapes = [weight_shape(state_dict, key, num_dims) for key in keys]
    if len(set(shapes)) > 1:
        raise ValueError(f'{" and ".join(keys)} have shapes {" and ".join(map(str, shapes))}')
    state_dict[target] = torch.cat([state_dict.pop(key) for key in keys])


def join_qkv(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Joins ``attn.q``, ``attn.k`` and ``attn.v``. Keys without a bias get zeros if queries have one."""
    for attn in _parents(state_dict, r'\.attn\.[qkv]\.(weight|bias)'):
        keys = [f'{attn}.attn.{name}.weight' for name in 'qkv']
        _join(state_dict, keys, f'{attn}.attn.qkv.weight', 2)
        biases = [key.replace('.weight', '.bias') for key in keys]
        if any(key in state_dict for key in biases):
            if biases[1] not in state_dict and biases[0] in state_dict:
                state_dict[biases[1]] = torch.zeros_like(state_dict[biases[0]])
            _join(state_dict, biases, f'{attn}.attn.qkv.bias', 1)


def join_biases(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Joins ``attn.q_bias`` and ``attn.v_bias`` with zeros for the keys."""
    for attn in _parents(state_dict, r'\.[qv]_bias'):
        q, k, v = (f'{attn}.{name}_bias' for name in 'qkv')
        weight_shape(state_dict, q, 1)
        state_dict[k] = torch.zeros_like(state_dict[q])
        _join(state_dict, [q, k, v], f'{attn}.qkv.bias', 1)


def zero_key_bias(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Gives keys a bias of zeros, and queries and values as well where they have none, as in DINOv3."""
    for attn in _parents(state_dict, r'\.qkv\.weight'):
        dim = weight_shape(state_dict, f'{attn}.qkv.weight', 2)[1]
        bias = state_dict.get(f'{attn}.qkv.bias', state_dict[f'{attn}.qkv.weight'].new_zeros(3 * dim))
        mask = state_dict.pop(f'{attn}.qkv.bias_mask', torch.ones_like(bias))
        if bias.shape != (3 * dim,) or mask.shape != (3 * dim,):
            raise ValueError(f'{attn}.qkv.bias and its mask have shapes {tuple(bias.shape)} and {tuple(mask.shape)}')
        q, k, v = (bias * mask).chunk(3)
        state_dict[f'{attn}.qkv.bias'] = torch.cat([q, torch.zeros_like(k), v])


def split_biases(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Splits biases of queries and values, and leaves them out if all are zero, as timm's DINOv3 does."""
    biases = {attn: state_dict.pop(f'{attn}.qkv.bias') for attn in _parents(state_dict, r'\.qkv\.bias')}
    for attn, bias in biases.items():
        q, k, v = bias.chunk(3)
        if k.any():
            raise CheckpointError(f'timm has no bias of keys here, which is not zero in {attn}.qkv.bias')
        if any(other.any() for other in biases.values()):
            state_dict.update({f'{attn}.q_bias': q, f'{attn}.v_bias': v})
    return state_dict


def _gated_mlps(state_dict: Dict[str, Tensor]) -> List[str]:
    return [mlp for mlp in _parents(state_dict, r'\.fc1\.weight') if is_gated(state_dict, mlp)]


def join_gate(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Joins the two linear layers of a gated MLP, ``mlp.gate`` and ``mlp.value``, to ``mlp.fc1``."""
    for mlp in _parents(state_dict, r'\.(gate|value)\.(weight|bias)'):
        for num_dims, leaf in ((2, 'weight'), (1, 'bias')):
            _join(state_dict, [f'{mlp}.gate.{leaf}', f'{mlp}.value.{leaf}'], f'{mlp}.fc1.{leaf}', num_dims)


def split_gate(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Undoes :func:`join_gate`."""
    for mlp in _gated_mlps(state_dict):
        for leaf in ('weight', 'bias'):
            gate, value = state_dict.pop(f'{mlp}.fc1.{leaf}').chunk(2)
            state_dict.update({f'{mlp}.gate.{leaf}': gate, f'{mlp}.value.{leaf}': value})
    return state_dict


def rename_gated(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Renames ``mlp.w12`` and ``mlp.w3``, DINOv2's names of a gated MLP, to ``mlp.fc1`` and ``mlp.fc2``."""
    for key in [key for key in state_dict if '.mlp.w' in key]:
        ours = key.replace('.w12.', '.fc1.').replace('.w3.', '.fc2.')
        if ours in state_dict:
            raise ValueError(f'{ours} is there beside {key}')
        state_dict[ours] = state_dict.pop(key)


def restore_gated(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Undoes :func:`rename_gated`."""
    for mlp in _gated_mlps(state_dict):
        for ours, theirs in (('fc1', 'w12'), ('fc2', 'w3')):
            for leaf in ('weight', 'bias'):
                state_dict[f'{mlp}.{theirs}.{leaf}'] = state_dict.pop(f'{mlp}.{ours}.{leaf}')
    return state_dict


def add_batch_dims(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Makes a class token (1, 1, C) and positions (1, N, C)."""
    for name in ('backbone.cls_token', 'backbone.pos_embed'):
        if name in state_dict:
            dim = state_dict[name].shape[-1:]
            state_dict[name] = state_dict[name].reshape(1, -1, *dim)


def add_patch_bias(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Adds a bias of zeros to a patch embedding that has none, as in CLIP and, by default, in MMSegmentation 1.2."""
    dim = weight_shape(state_dict, 'backbone.patch_embed.proj.weight', 4)[0]
    bias = state_dict['backbone.patch_embed.proj.weight'].new_zeros(dim)
    state_dict.setdefault('backbone.patch_embed.proj.bias', bias)


def add_cls_position(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Adds a position of zeros for a class token that has none, if the positions alone fill a square.

    Only models with registers or layer scale may lack it, and files of this package never do.
    """
    has_token, has_positions, has_registers, has_scale = (
        f'backbone.{key}' in state_dict for key in ('cls_token', 'pos_embed', 'reg_token', 'blocks.0.ls1.gamma')
    )
    if not (has_token and has_positions and (has_registers or has_scale)):
        return
    number = weight_shape(state_dict, 'backbone.pos_embed', 3)[1]
    if backbone_metadata(state_dict) is None and math.isqrt(number) ** 2 == number:
        positions = state_dict['backbone.pos_embed']
        state_dict['backbone.pos_embed'] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)


def merge_cls_position(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Adds the position of the class token to the token where timm has none: beside registers, DeiT III, RoPE-ViT."""
    positions, token = (state_dict.get(f'backbone.{name}') for name in ('pos_embed', 'cls_token'))
    if positions is None or token is None:
        return state_dict
    is_zero = 'backbone.blocks.0.ls1.gamma' in state_dict and not positions[:, :1].any()
    if 'backbone.reg_token' in state_dict or 'backbone.rope.freqs' in state_dict or is_zero:
        state_dict.update({'backbone.cls_token': token + positions[:, :1], 'backbone.pos_embed': positions[:, 1:]})
    return state_dict


def drop_patch_bias(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Drops a patch bias of zeros where timm has none: beside a norm before the blocks."""
    key = 'backbone.patch_embed.proj.bias'
    if 'backbone.norm_pre.weight' in state_dict and key in state_dict and not state_dict[key].any():
        del state_dict[key]
    return state_dict


def drop_rotary_buffers(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Drops the buffers of rotary positions, which timm computes itself."""
    return {key: value for key, value in state_dict.items() if key not in ROTARY_BUFFERS}


def flatten_linears(state_dict: Dict[str, Tensor], dropped: Dict[str, str]) -> None:
    """Transposes Flax's kernels: of patches from (H, W, I, O), of heads from (I, heads, D) and (heads, D, O)."""
    weight_shape(state_dict, 'backbone.patch_embed.proj.weight', 4)
    for key, value in state_dict.items():
        if key.endswith(('.attn.q.bias', '.attn.k.bias', '.attn.v.bias')):
            state_dict[key] = value.flatten()
        elif not key.endswith('weight') or 'norm' in key or value.dim() < 2:
            continue
        elif value.dim() == 4:
            state_dict[key] = value.permute(3, 2, 0, 1).contiguous()
        elif key.endswith('.attn.proj.weight'):
            state_dict[key] = value.flatten(0, 1).T.contiguous()
        else:
            state_dict[key] = value.flatten(1).T.contiguous()


def heads_of_flax(state_dict: Dict[str, Tensor]) -> Dict[str, Any]:
    """Returns the number of heads, which Flax's biases of queries tell."""
    return dict(num_heads=weight_shape(state_dict, 'backbone.blocks.0.attn.q.bias', 2)[0])


def metadata_of_timm(state_dict: Dict[str, Tensor]) -> Dict[str, Any]:
    """Returns what timm's models with the options of these weights have in common.

    ViT, DeiT and MAE have only a class token and positions. Their authors' files have the same names, and their rules
    for resized positions differ, so for them nothing is known.
    """
    has_scale, has_token, has_registers, has_pre_norm, has_norm = (
        f'backbone.{key}' in state_dict
        for key in ('blocks.0.ls1.gamma', 'cls_token', 'reg_token', 'norm_pre.weight', 'norm.weight')
    )
    metadata: Dict[str, Any] = {}
    if has_scale or has_registers or has_pre_norm or not has_token:
        metadata['interpolate_antialias'] = True
    if has_pre_norm:
        metadata['norm_eps'] = 1e-5
    if has_scale and has_token and has_norm and 'head.fc.weight' not in state_dict:
        # DINOv2. In DeiT III the class token has no position, so that the positions fill a square.
        has_own_positions = 'backbone.pos_embed' in state_dict and not has_registers
        number = weight_shape(state_dict, 'backbone.pos_embed', 3)[1] if has_own_positions else 0
        metadata['norm_outputs'] = not number or math.isqrt(number) ** 2 != number
    if has_norm and not (has_scale or has_token or has_registers) and 'backbone.pos_embed' in state_dict:
        metadata['act'] = act_of_siglip(state_dict)
    return metadata


def act_of_siglip(state_dict: Dict[str, Tensor]) -> str:
    """Returns the activation of the published SigLIP of these shapes in timm, which differs among them."""
    dim, _, patch_size, _ = weight_shape(state_dict, 'backbone.patch_embed.proj.weight', 4)
    num_patches = weight_shape(state_dict, 'backbone.pos_embed', 3)[1]
    uses_tanh = dim == 1536 or (dim, patch_size) in ((768, 32), (1152, 16)) or (dim, num_patches) == (1024, 1024)
    return 'gelu_tanh' if uses_tanh else 'gelu'
