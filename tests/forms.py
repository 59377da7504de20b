"""Slim models of every family and form: the whole structure with few channels and blocks.

Also helpers for tests that build large models or start processes.
"""

import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Callable, Tuple

import torch
from mmengine.registry import MODELS
from torch import nn

from mmvitzoo.models import MPViT, MViTv2, PlainViT, ScalableViT, ViTAE


def block_number(name: str) -> int:
    """Returns the ``frozen_stages`` that freezes a parameter: stages of MPViT, blocks of PlainViT and ViTAE."""
    part, *rest = name.split('.')
    if part in ('blocks', 'stages'):
        return int(rest[0]) + 1
    return VIT_ARCH['num_layers'] if part == 'norm' else 0


def stage_of_mvitv2(name: str) -> int:
    """Returns the ``frozen_stages`` that freezes a parameter."""
    part, index = name.split('.')[:2]
    if part == 'patch_embed':
        return 0
    return 1 + ((0, 1, 1, 2, 2, 3)[int(index)] if part == 'blocks' else int(part[-1]))


def stage_of_scalablevit(name: str) -> int:
    """Returns the ``frozen_stages`` that freezes a parameter."""
    part, index = name.split('.')[:2]
    if part == 'patch_embeds' and index == '0':
        return 0
    return 1 + int(part[-1] if part.startswith('norm') else index)


@dataclass
class Form:
    """A slim model and its expected properties."""

    build: Callable[..., nn.Module]
    strides: Tuple[int, ...]
    channels: Tuple[int, ...]
    part: Callable[[str], int]  # name of a parameter -> the smallest frozen_stages that freezes it
    grows: Tuple[float, ...]  # drop path rate of each block over drop_path_rate
    recomputed: float = 0.7  # upper bound of the memory for the backward pass with with_cp, over that without


VIT_ARCH = dict(embed_dims=48, num_layers=4, num_heads=3, mlp_ratio=2)
VITDET = dict(with_cls_token=False, window_size=3, global_attn_indexes=(1, 3), use_rel_pos=True)
VITAE = dict(VIT_ARCH, global_attn_indexes=(1, 3), pcm_convs=2, reduction_dims=None)
MPVIT = dict(num_paths=(2, 3, 3, 3), num_layers=(1, 2, 1, 1), embed_dims=(16, 24, 32, 40), mlp_ratios=(2, 2, 2, 2))
MVITV2 = dict(embed_dims=16, num_layers=6, num_heads=2, downscale_indices=(1, 3, 5))
SCALABLE = dict(
    embed_dims=(16, 24, 32, 40),
    num_layers=(2, 2, 2, 2),
    num_heads=(2, 2, 4, 4),
    spatial_ratios=(8, 4, 2, 1),
    channel_ratios=(1.25, 0.5, 1, 1),
)

plain = partial(Form, strides=(16,) * 4, channels=(48,) * 4, part=block_number, grows=tuple(i / 3 for i in range(4)))
pyramid = partial(Form, strides=(4, 8, 16, 32))
mvitv2 = partial(pyramid, part=stage_of_mvitv2, grows=tuple(i / 5 for i in range(6)))
FORMS = dict(
    mpvit=pyramid(
        partial(MPViT, MPVIT),
        channels=(24, 32, 40, 40),
        part=block_number,
        grows=tuple(i / 4 for i in 2 * [0] + 3 * [1, 2] + 3 * [3] + 3 * [4]),  # the paths of a stage share its rates
    ),
    vit=plain(partial(PlainViT, VIT_ARCH, img_size=64)),
    vitdet=plain(partial(PlainViT, VIT_ARCH, img_size=96, pretrain_img_size=64, **VITDET)),
    vitdet_conv=plain(
        partial(PlainViT, VIT_ARCH, img_size=96, residual_block_indexes=(1, 3), **dict(VITDET, global_attn_indexes=()))
    ),
    dinov2=plain(partial(PlainViT, VIT_ARCH, img_size=64, interpolate_offset=0.1, layer_scale_init_value=0.5)),
    dinov3=plain(
        partial(
            PlainViT,
            VIT_ARCH,
            pos_type='rope',
            num_register_tokens=2,
            ffn_type='swiglu',
            layer_scale_init_value=0.5,
            norm_outputs=True,
        )
    ),
    vit_rope=plain(partial(PlainViT, VIT_ARCH, img_size=64, pos_type='learned+rope', rope_type='mixed')),
    # The convolutions beside attention, and the cells before it, are not recomputed.
    vitae=plain(partial(ViTAE, VITAE, img_size=96, window_size=3), recomputed=0.85),
    vitae_s=plain(
        partial(ViTAE, dict(VITAE, pcm_convs=3, reduction_dims=(24, 32)), img_size=96, window_size=3), recomputed=0.95
    ),
    mvitv2=mvitv2(partial(MViTv2, MVITV2), channels=(16, 32, 64, 128)),
    mvitv2_windows=mvitv2(partial(MViTv2, MVITV2, window_attention=True), channels=(16, 32, 64, 128)),
    scalablevit=pyramid(
        partial(ScalableViT, SCALABLE),
        channels=(16, 24, 32, 40),
        part=stage_of_scalablevit,
        grows=tuple(i / 7 for i in range(8)),
    ),
    mvitv2_mlp=mvitv2(partial(MViTv2, MVITV2, dim_mul_in_attention=False), channels=(32, 64, 128, 128)),
)


def slim(form, out_indices=(0, 1, 2, 3), **kwargs):
    torch.manual_seed(0)
    model = FORMS[form].build(out_indices=out_indices, **kwargs)
    model.init_weights()
    for name, value in model.named_parameters():  # as if trained: nothing is zero
        if 'rel_pos' in name or '.residual.' in name:
            nn.init.normal_(value, std=0.2)
    return model


def build_converted(result, **kwargs):
    """Builds the backbone of converted weights and shares them: large models are neither initialized nor copied."""
    with torch.device('meta'):
        model = MODELS.build({**result.backbone_cfg, **kwargs})
    model.load_state_dict(result.backbone, strict=True, assign=True)
    return model.eval()


def free_port():
    """Finds a free port, as a string for the environment variable PORT."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return str(listener.getsockname()[1])


def in_own_process(function, *args):
    """Calls a module's function in a new process, whose memory is freed afterwards, and raises its exceptions."""
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        pool.submit(function, *args).result()
