"""Compares the speed and memory of our backbones with other libraries: benchmark.py [CASE ...].

The models of a case take turns in one process. The tool prints the median time and the peak memory of a run, without
model and input, and the ratio of both to our model. Peers that are not installed are skipped. All weights are random;
reference implementations from `benchmarks/` share ours. `memory` measures how the memory of a global attention block
grows with the image, `checkpointing` the memory of a training step with and without activation checkpointing.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from mmcv.cnn.utils import fuse_conv_bn
from mmengine.registry import MODELS
from torch import Tensor, nn

import mmvitzoo
from mmvitzoo.models.backbones.vit import Block

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))

# Input shape, our model, and constructors of its peers by name.
Case = Tuple[Tuple[int, ...], nn.Module, Dict[str, Callable[[], nn.Module]]]


class Method(nn.Module):
    """Module that calls a method of a model."""

    def __init__(self, model: nn.Module, name: str, **kwargs):
        super().__init__()
        self.model, self.name, self.kwargs = model, name, kwargs

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.name)(x, **self.kwargs)


def timm_model(name: str, method: str = 'forward_features', img_size: Optional[int] = None, **kwargs) -> nn.Module:
    import timm

    sizes = {} if img_size is None else dict(img_size=img_size)
    return Method(timm.create_model(name, num_classes=0, **sizes), method, **kwargs)


def mmpretrain_mvit(**kwargs) -> nn.Module:
    from mmpretrain.models.backbones import MViT

    return MViT('tiny', **kwargs)


def mmpretrain_vit(arch: str, img_size: int) -> nn.Module:
    from mmpretrain.models.backbones import VisionTransformer

    return VisionTransformer(arch, img_size=img_size, patch_size=14, layer_scale_init_value=1e-5)


def transformers_model(family: str, img_size: int, patch_size: int) -> nn.Module:
    """Builds a small model of Hugging Face, whose package cannot be installed beside MMPretrain."""
    import transformers

    config = getattr(transformers, f'{family}Config')(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=img_size, patch_size=patch_size
    )
    return getattr(transformers, f'{family}Model')(config)


def mmseg_vit(**kwargs) -> nn.Module:
    from mmseg.models.backbones import VisionTransformer

    return VisionTransformer(**kwargs)


def reference(family: str, model: nn.Module) -> Callable[[], nn.Module]:
    from importlib import import_module

    name = f'Reference{type(model).__name__}'
    return lambda: getattr(import_module(f'references.{family}'), name)(model)


def vitdet_base() -> Case:
    """Backbone of ViTDet without its pyramid; timm's model has the neck of Segment Anything, 0.3% of the FLOPs."""
    model = MODELS.build(
        dict(
            type='PlainViT',
            arch='base',
            img_size=1024,
            pretrain_img_size=224,
            with_cls_token=False,
            final_norm=False,
            window_size=14,
            global_attn_indexes=(2, 5, 8, 11),
            use_rel_pos=True,
        )
    )
    return (1, 3, 1024, 1024), model, {'timm samvit_base_patch16': lambda: timm_model('samvit_base_patch16')}


def upernet_base() -> Case:
    """ViT-B with the four maps of UPerNet."""
    blocks = (2, 5, 8, 11)
    model = MODELS.build(dict(type='PlainViT', arch='base', img_size=512, out_indices=blocks, final_norm=False))
    return (
        (1, 3, 512, 512),
        model,
        {
            'mmseg VisionTransformer': lambda: mmseg_vit(
                img_size=512, embed_dims=768, num_layers=12, num_heads=12, out_indices=blocks
            ),
            'timm vit_base_patch16_224': lambda: timm_model(
                'vit_base_patch16_224',
                'forward_intermediates',
                512,
                indices=list(blocks),
                intermediates_only=True,
                norm=False,
            ),
        },
    )


def vit_base() -> Case:
    """ViT-B with the last map, as in a classifier."""
    model = MODELS.build(dict(type='PlainViT', arch='base'))
    return (8, 3, 224, 224), model, {'timm vit_base_patch16_224': lambda: timm_model('vit_base_patch16_224')}


def dinov2_small(img_size: int = 518) -> Case:
    """DINOv2 ViT-S/14 with the last map; peers with their own rules of positions."""
    options = dict(arch='small', patch_size=14, layer_scale_init_value=1e-5)
    model = MODELS.build(dict(type='PlainViT', img_size=518, interpolate_offset=0.1, **options))
    return (
        (1, 3, img_size, img_size),
        model,
        {
            'timm vit_small_patch14_dinov2': lambda: timm_model('vit_small_patch14_dinov2', img_size=img_size),
            'mmpretrain VisionTransformer': lambda: mmpretrain_vit('dinov2-small', img_size),
            'transformers Dinov2Model': lambda: transformers_model('Dinov2', 518, 14),
        },
    )


def dinov3_small(img_size: int = 512) -> Case:
    """DINOv3 ViT-S/16 with the last map."""
    options = dict(arch='small', num_register_tokens=4, layer_scale_init_value=1e-5)
    model = MODELS.build(dict(type='PlainViT', pos_type='rope', norm_eps=1e-5, **options))
    return (
        (1, 3, img_size, img_size),
        model,
        {
            'timm vit_small_patch16_dinov3': lambda: timm_model('vit_small_patch16_dinov3', img_size=img_size),
            'transformers DINOv3ViTModel': lambda: transformers_model('DINOv3ViT', img_size, 16),
        },
    )


def mvitv2_tiny() -> Case:
    """MViTv2-T with the last map, as in a classifier."""
    model = MODELS.build(dict(type='MViTv2', arch='tiny'))
    return (
        (8, 3, 224, 224),
        model,
        {
            'reference': reference('mvitv2', model),
            'timm mvitv2_tiny': lambda: timm_model('mvitv2_tiny'),
            'mmpretrain MViT': mmpretrain_mvit,
        },
    )


def mvitv2_tiny_dense() -> Case:
    """Detection form with four maps; MMPretrain's model has no windows."""
    scales = (0, 1, 2, 3)
    model = MODELS.build(dict(type='MViTv2', arch='tiny', out_indices=scales, window_attention=True))
    peers = {'reference': reference('mvitv2', model), 'mmpretrain MViT': lambda: mmpretrain_mvit(out_scales=scales)}
    return (1, 3, 800, 1216), model, peers


def mpvit_small() -> Case:
    """MPViT-S with the last map, as in a classifier."""
    model = MODELS.build(dict(type='MPViT', arch='small', out_indices=(3,)))
    return (8, 3, 224, 224), model, {'reference': reference('mpvit', model)}


def mpvit_small_dense() -> Case:
    model = MODELS.build(dict(type='MPViT', arch='small'))
    return (1, 3, 800, 1216), model, {'reference': reference('mpvit', model)}


def scalablevit_small() -> Case:
    """ScalableViT-S with the last map, as in a classifier."""
    model = MODELS.build(dict(type='ScalableViT', arch='small', out_indices=(3,)))
    return (8, 3, 224, 224), model, {'reference': reference('scalablevit', model)}


def scalablevit_small_dense() -> Case:
    model = MODELS.build(dict(type='ScalableViT', arch='small'))
    return (1, 3, 800, 1216), model, {'reference': reference('scalablevit', model)}


CASES = {
    'vitdet-base': vitdet_base,
    'upernet-base': upernet_base,
    'vit-base': vit_base,
    'dinov2-small': dinov2_small,
    'dinov2-small-dense': partial(dinov2_small, 1036),
    'dinov3-small': dinov3_small,
    'dinov3-small-dense': partial(dinov3_small, 1024),
    'mvitv2-tiny': mvitv2_tiny,
    'mvitv2-tiny-dense': mvitv2_tiny_dense,
    'mpvit-small': mpvit_small,
    'mpvit-small-dense': mpvit_small_dense,
    'scalablevit-small': scalablevit_small,
    'scalablevit-small-dense': scalablevit_small_dense,
}
MEMORY = ('memory', 'checkpointing')


def run_case(case: str, args: argparse.Namespace) -> Dict[str, Dict[str, float]]:
    """Returns the median time in seconds and the peak memory in MiB by model."""
    shape, ours, peers = CASES[case]()
    models = {'ours': ours}
    for name, build in peers.items():
        try:
            models[name] = build()
        except ImportError as error:
            print(f'{case:26}{name:30}skipped: {error}', flush=True)
    x = torch.randn(*(args.shape[:1] + [3] + args.shape[1:] if args.shape else shape), device=args.device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format)
    for name, model in models.items():
        model.train(args.train)  # MMPretrain's returns None
        model = model.to(args.device, memory_format=memory_format)
        if args.fuse:
            model = fuse_conv_bn(model)
        if args.optimize and name == 'ours':
            model = mmvitzoo.optimize_for_inference(model)
        models[name] = torch.compile(model) if args.compile else model
    memory = {}
    for name, model in models.items():
        step(model, x, args)  # warm up: compilation and first allocations
        memory[name] = peak_memory(lambda model=model: step(model, x, args), args.device)
    times: Dict[str, List[float]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            times[name].append(seconds(lambda model=model: step(model, x, args), args.device))
    return {name: dict(seconds=statistics.median(times[name]), mebibytes=memory[name]) for name in models}


def step(model: nn.Module, x: Tensor, args: argparse.Namespace) -> None:
    """Runs one inference, or one forward and backward pass."""
    half = torch.autocast(args.device, torch.bfloat16) if args.bf16 else nullcontext()
    with nullcontext() if args.train else torch.inference_mode():
        with half:
            outs = model(x)
        if args.train:
            maps = [outs] if isinstance(outs, Tensor) else outs
            sum(out.float().mean() for out in maps).backward()
            model.zero_grad()


def seconds(work: Callable[[], None], device: str) -> float:
    if device == 'cpu':
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_memory(work: Callable[[], None], device: str) -> float:
    """Returns the peak memory of a call in MiB, beyond the memory in use before; NaN on a CPU without Linux."""
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path('/proc/self/clear_refs').exists():
        return float('nan')
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'malloc_trim'):
        libc.malloc_trim(0)  # freed memory that the process keeps would hide new allocations
    Path('/proc/self/clear_refs').write_text('5')  # resets the peak
    before = status('VmRSS')
    work()
    return status('VmHWM') - before


def status(field: str) -> float:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def global_block_memory(pixels: int) -> float:
    """Returns the peak memory in MiB of an optimized global attention block of ViT-B with relative positions."""
    side = pixels // 16
    block = mmvitzoo.optimize_for_inference(Block(768, 12, 4, input_size=(side, side)).eval())
    x = torch.randn(1, side, side, 768)
    with torch.inference_mode():
        return peak_memory(lambda: block(x), 'cpu')


def checkpointing_memory(args: argparse.Namespace) -> Dict[str, Tuple[float, float]]:
    """Returns the peak memory in MiB of a training step on a 1024 x 1024 image, without and with checkpointing."""
    window_vit = dict(with_cls_token=False, window_size=14, global_attn_indexes=(5, 11, 17, 23), use_rel_pos=True)
    configs = {
        'PlainViT large': dict(type='PlainViT', arch='large', img_size=1024, **window_vit),
        'MViTv2 base': dict(type='MViTv2', arch='base', out_indices=(0, 1, 2, 3), window_attention=True),
    }
    x = torch.randn(1, 3, 1024, 1024, device=args.device)
    args = argparse.Namespace(device=args.device, bf16=args.bf16, train=True)
    peaks: Dict[str, Tuple[float, float]] = {}
    for name, config in configs.items():
        models = (MODELS.build(dict(config, with_cp=with_cp)).train().to(args.device) for with_cp in (False, True))
        peaks[name] = tuple(peak_memory(lambda model=model: step(model, x, args), args.device) for model in models)
    return peaks


def draw(results: Dict[str, Dict[str, Dict[str, float]]], title: str, path: str) -> None:
    """Draws a bar for each model of each case: its time divided by ours."""
    import matplotlib.pyplot as plt

    bars = [
        (case, name, x['seconds'], x['seconds'] / models['ours']['seconds'])
        for case, models in results.items()
        for name, x in models.items()
    ]
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.3 * len(bars)))
    rows = range(len(bars))
    axis.barh(rows, [bar[3] for bar in bars], color=['C0' if bar[1] == 'ours' else 'C7' for bar in bars])
    for row, (*_, time_, ratio) in zip(rows, bars):
        axis.text(ratio, row, f' {time_:.3g} s', va='center', fontsize=8)
    axis.set_yticks(rows, [f'{case}: {name}' for case, name, *_ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.axvline(1, color='C0', linewidth=0.8)
    axis.set(xlabel='time / our time', title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ', '.join([*CASES, *MEMORY])
    parser.add_argument('cases', nargs='*', metavar='CASE', help=f'one of {names}; default: all')
    parser.add_argument('--rounds', type=int, default=5, help='number of runs of each model')
    parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)), help='number of CPU threads')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument(
        '--shape', nargs=3, type=int, metavar=('B', 'H', 'W'), help='shape of the images; default: that of the case'
    )
    parser.add_argument('--train', action='store_true', help='forward and backward pass instead of inference')
    parser.add_argument('--bf16', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--compile', action='store_true', help='torch.compile every model')
    parser.add_argument('--fuse', action='store_true', help="mmcv's fuse_conv_bn on every model, for inference")
    parser.add_argument('--optimize', action='store_true', help='apply mmvitzoo.optimize_for_inference to our models')
    parser.add_argument('--channels-last', action='store_true', help='models and images in channels-last memory')
    parser.add_argument('--json', help='JSON file for the results')
    parser.add_argument('--chart', help='picture file for a bar chart of the times')
    args = parser.parse_args()
    unknown = set(args.cases) - {*CASES, *MEMORY}
    if unknown:
        parser.error(f'CASE is one of {names}, got {", ".join(unknown)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU')
    if args.fuse and args.train:
        parser.error('--fuse is for inference: norms that train are not folded')
    if args.optimize and (args.train or args.device != 'cpu'):
        parser.error('--optimize is for inference on a CPU')
    for path in filter(None, (args.json, args.chart)):  # before the measurements, not after them
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: Dict[str, Any] = {}
    for case in args.cases or [*CASES, *MEMORY]:
        if case == 'memory':
            for pixels in (1024, 2048, 4096):
                print(f'{case:26}{f"{pixels} pixels":30}{global_block_memory(pixels):8.0f} MiB')
            continue
        if case == 'checkpointing':
            for name, (full, saving) in checkpointing_memory(args).items():
                print(f'{case:26}{name:30}{full:8.0f} MiB{saving:8.0f} MiB{1 - saving / full:8.0%} saved')
            continue
        results[case] = run_case(case, args)
        ours = results[case]['ours']
        for name, model in results[case].items():
            ratios = {key: model[key] / max(ours[key], 1e-9) for key in model}
            print(
                f'{case:26}{name:30}{model["seconds"]:8.3f} s{ratios["seconds"]:8.2f}x'
                f'{model["mebibytes"]:10.0f} MiB{ratios["mebibytes"]:8.2f}x',
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + '\n')
    if args.chart:
        mode = ['training step' if args.train else 'inference', 'bfloat16' if args.bf16 else 'float32', args.device]
        draw(results, ', '.join(mode), args.chart)


if __name__ == '__main__':
    main()
