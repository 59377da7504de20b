"""Times backbones of this package beside their peers: benchmark.py [CASE ...].

Models of a case take turns in one process; printed are medians, and each peer's time over ours.
The peers have random weights, as ours have; plain versions of a model, from `benchmarks/`, have the
same. `memory` shows how the memory of an attention block
that sees the whole image grows with the image.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.registry import MODELS

import mmvitzoo  # noqa: F401  registers the models
from mmvitzoo.models.backbones.vit import PlainBlock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))


def ours(**cfg):
    return MODELS.build(cfg).eval()


def timm_model(name, **kwargs):
    import timm

    return timm.create_model(name, num_classes=0, **kwargs).eval()


def vitdet_base():
    """ViTDet's backbone without its pyramid; timm's has Segment Anything's neck, 0.3% of the work."""
    model = ours(
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
    return (1, 3, 1024, 1024), {
        'ours': model,
        'timm samvit_base_patch16': timm_model('samvit_base_patch16').forward_features,
    }


def upernet_base():
    """The four maps that UPerNet reads."""
    from mmseg.models.backbones import VisionTransformer

    blocks = (2, 5, 8, 11)
    peer = timm_model('vit_base_patch16_224', img_size=512)
    mmseg = VisionTransformer(img_size=512, embed_dims=768, num_layers=12, num_heads=12, out_indices=blocks)
    mmseg.eval()  # returns None
    return (1, 3, 512, 512), {
        'ours': ours(type='PlainViT', arch='base', img_size=512, out_indices=blocks, final_norm=False),
        'mmseg VisionTransformer': mmseg,
        'timm vit_base_patch16_224': lambda x: peer.forward_intermediates(
            x, indices=list(blocks), intermediates_only=True
        ),
    }


def mmpretrain_mvit(**kwargs):
    from mmpretrain.models.backbones import MViT

    model = MViT('tiny', **kwargs)
    model.eval()  # returns None
    return model


def mvitv2_tiny():
    """The last map, as classifiers read it."""
    from references.mvitv2 import PlainMViTv2

    model = ours(type='MViTv2', arch='tiny')
    return (8, 3, 224, 224), {
        'ours': model,
        'plain': PlainMViTv2(model).eval(),
        'timm mvitv2_tiny': timm_model('mvitv2_tiny').forward_features,
        'mmpretrain MViT': mmpretrain_mvit(),
    }


def mvitv2_tiny_dense():
    """Four maps in the detection form. MMPretrain's model has no windows."""
    from references.mvitv2 import PlainMViTv2

    scales = (0, 1, 2, 3)
    model = ours(type='MViTv2', arch='tiny', out_indices=scales, window_attention=True)
    return (1, 3, 800, 1216), {
        'ours': model,
        'plain': PlainMViTv2(model).eval(),
        'mmpretrain MViT': mmpretrain_mvit(out_scales=scales),
    }


def mpvit_small():
    """The last map, as classifiers read it."""
    from references.mpvit import PlainMPViT

    model = ours(type='MPViT', arch='small', out_indices=(3,))
    return (8, 3, 224, 224), {'ours': model, 'plain': PlainMPViT(model).eval()}


def mpvit_small_dense():
    from references.mpvit import PlainMPViT

    model = ours(type='MPViT', arch='small')
    return (1, 3, 800, 1216), {'ours': model, 'plain': PlainMPViT(model).eval()}


def scalablevit_small():
    """The last map, as classifiers read it."""
    from references.scalablevit import PlainScalableViT

    model = ours(type='ScalableViT', arch='small', out_indices=(3,))
    return (8, 3, 224, 224), {'ours': model, 'plain': PlainScalableViT(model).eval()}


def scalablevit_small_dense():
    from references.scalablevit import PlainScalableViT

    model = ours(type='ScalableViT', arch='small')
    return (1, 3, 800, 1216), {'ours': model, 'plain': PlainScalableViT(model).eval()}


CASES = {
    'vitdet-base': vitdet_base,
    'upernet-base': upernet_base,
    'mvitv2-tiny': mvitv2_tiny,
    'mvitv2-tiny-dense': mvitv2_tiny_dense,
    'mpvit-small': mpvit_small,
    'mpvit-small-dense': mpvit_small_dense,
    'scalablevit-small': scalablevit_small,
    'scalablevit-small-dense': scalablevit_small_dense,
}


def run_case(case, rounds):
    """Medians in seconds by model."""
    shape, models = CASES[case]()
    x = torch.randn(shape)
    times = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(x)
        for _ in range(rounds):
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def status(field):
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def global_block_memory(pixels):
    """Peak MiB beyond its input that a ViT-B block with relative positions needs (Linux only)."""
    side = pixels // 16
    block = PlainBlock(768, 12, 4, 0, rel_pos_size=(side, side)).eval()
    x = torch.randn(1, side, side, 768)
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here on
    before = status('VmRSS')
    with torch.inference_mode():
        block(x)
    return status('VmHWM') - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('cases', nargs='*', metavar='CASE', help=f'{", ".join(CASES)} or memory; default: all')
    parser.add_argument('--rounds', type=int, default=5, help='times that every model takes its turn')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', help='file to write the numbers to')
    args = parser.parse_args()
    unknown = set(args.cases) - {*CASES, 'memory'}
    if unknown:
        parser.error(f'unknown case {", ".join(unknown)}; known are {", ".join(CASES)}, memory')
    torch.set_num_threads(args.threads)
    cases = args.cases or [*CASES, 'memory']
    results = {}
    for case in cases:
        if case == 'memory':
            results[case] = {f'{pixels} pixels': global_block_memory(pixels) for pixels in (1024, 2048, 4096)}
            for name, mebibytes in results[case].items():
                print(f'{case:26}{name:30}{mebibytes:8.0f} MiB')
            continue
        results[case] = run_case(case, args.rounds)
        for name, seconds in results[case].items():
            print(f'{case:26}{name:30}{seconds:8.3f} s{seconds / results[case]["ours"]:8.2f}x', flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main()
