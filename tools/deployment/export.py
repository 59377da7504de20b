"""Exports a config's model: export.py CONFIG [CHECKPOINT] --format onnx|torchscript|exported-program --out FILE.

A classifier gives logits (B, classes), a segmentor logits (B, classes, H, W) of the image's size, a detector
the maps of its neck, or of its backbone if there is none. The input are normalised images (B, 3, H, W), as
the model's data_preprocessor makes them. With --dynamic one file takes every batch and image size; without it,
single images of --shape.

The file runs on three sizes (one without --dynamic) and has to agree with the model before it takes its
place. Needs PyTorch 2.9; onnx also `pip install -r requirements/export.txt`.
"""

import argparse
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Callable, List, Sequence

import torch
from mmengine.utils import digit_version
from torch import Tensor, nn

from mmvitzoo.inference import load_model

FORMATS = dict(onnx='.onnx', torchscript='.pt', **{'exported-program': '.pt2'})
TOLERANCE = 1e-4  # of the norm of an output
# No side of a map, at any stride, is a multiple of a window: the general case, of which others are special ones.
TRACED = (2, 3, 230, 294)
CHECKED = ((1, 3, 320, 256), (2, 3, 227, 373), (3, 3, 256, 448))


class AdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, which exporters know for every size.

    Args:
        size: (H', W').
    """

    def __init__(self, size: Sequence[int]):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        rows, cols = (shares(x.shape[i], out, x) for i, out in zip((2, 3), self.size))
        return rows @ x @ cols.T


def shares(size: int, out: int, like: Tensor) -> Tensor:
    """(out, size), the part that each pixel has in the mean of each bin."""
    place, bins = (torch.arange(n, device=like.device)[:, None] for n in (size, out))
    inside = (bins * size // out <= place.T) & (((bins + 1) * size + out - 1) // out > place.T)
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class Enlarge(nn.Module):
    """MMSegmentation's ``Upsample``, which makes numbers of sizes."""

    def __init__(self, upsample: nn.Module):
        super().__init__()
        self.factor = int(upsample.scale_factor)
        self.options = dict(mode=upsample.mode, align_corners=upsample.align_corners)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, factor * H, factor * W)."""
        return nn.functional.interpolate(x, (self.factor * x.shape[2], self.factor * x.shape[3]), **self.options)


class Exported(nn.Module):
    """What is exported of a model of the three toolboxes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        for parent in list(model.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.AdaptiveAvgPool2d):
                    size = module.output_size
                    setattr(parent, name, AdaptivePool((size, size) if isinstance(size, int) else size))
                elif type(module).__name__ == 'Upsample' and module.scale_factor:
                    setattr(parent, name, Enlarge(module))

    def output_names(self) -> List[str]:
        """Names of what ``forward`` returns."""
        if hasattr(self.model, 'decode_head') or hasattr(self.model, 'head'):
            return ['logits']
        with torch.no_grad():
            return [f'map{i}' for i in range(len(self(torch.zeros(TRACED))))]

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """(B, 3, H, W) -> logits, or maps."""
        features = self.model.extract_feat(images)
        if hasattr(self.model, 'decode_head'):
            logits = self.model.decode_head(features)
            size = images.shape[2:]
            aligned = self.model.decode_head.align_corners
            return (nn.functional.interpolate(logits, size, mode='bilinear', align_corners=aligned),)
        if hasattr(self.model, 'head'):
            return (self.model.head(features),)
        return tuple(features)


def export_onnx(model: Exported, images: Tensor, dynamic: bool, path: Path, opset: int) -> Callable:
    import onnxruntime

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        opset_version=opset,
        input_names=['images'],
        output_names=model.output_names(),
        dynamic_shapes=({0: 'batch', 2: 'height', 3: 'width'},) if dynamic else None,
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {'images': x.numpy()})]


def export_torchscript(model: Exported, images: Tensor, dynamic: bool, path: Path, opset: int) -> Callable:
    torch.jit.trace(model, images, check_trace=False).save(str(path))
    return torch.jit.load(str(path))


def export_program(model: Exported, images: Tensor, dynamic: bool, path: Path, opset: int) -> Callable:
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC) if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=(sizes,))
    if dynamic:
        shape = next(node.meta['val'] for node in program.graph.nodes if node.name == 'images').shape
        least = [program.range_constraints[shape[i].node.expr].lower for i in (2, 3)]
        print(f'accepts images of at least {least[0]} x {least[1]} pixels')
        # PyTorch's guards also hold that pooling leaves over as many pixels as in the example, or that maps lie
        # in memory as they did there, on which no operation depends. Other sizes are tried below.
        program._guards_code = []
    torch.export.save(program, path)
    return torch.export.load(path).module()


EXPORTERS = dict(zip(FORMATS, (export_onnx, export_torchscript, export_program)))


def build(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Exported:
    """The config's model with the checkpoint's weights, or with random ones."""
    try:
        model = load_model(args.config, args.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f'{error}\n')
    if not args.checkpoint:
        print('no checkpoint: the weights are random')
    return Exported(model.requires_grad_(False))


def error_of(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest distance of an output from what is expected, over the norm of that."""
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return float('inf')
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(outputs, expected))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='?', help='of a training with this config; default: random weights')
    parser.add_argument('--format', choices=FORMATS, required=True)
    parser.add_argument('--out', type=Path, required=True, help='file to write')
    parser.add_argument('--dynamic', action='store_true', help='any batch and image size')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='of the images, without --dynamic')
    parser.add_argument('--opset', type=int, default=18, help='of ONNX, 18 to 21')
    parser.add_argument('--overwrite', action='store_true', help='replace the file if there is one')
    args = parser.parse_args()
    if args.dynamic == bool(args.shape):
        parser.error('either --dynamic or --shape H W')
    if args.shape and min(args.shape) < 32:
        parser.error(f'--shape: images have at least 32 pixels a side, got {args.shape}')
    if not 18 <= args.opset <= 21:
        parser.error(f'--opset is 18 to 21, got {args.opset}')
    if args.out.suffix != FORMATS[args.format]:
        parser.error(f'--out: files of {args.format} end in {FORMATS[args.format]}, got {args.out}')
    if args.out.exists() and not args.overwrite:
        parser.error(f'{args.out} exists already; --overwrite replaces it')
    if digit_version(torch.__version__) < digit_version('2.9'):
        parser.exit(1, f'exporting needs PyTorch 2.9, found {torch.__version__}\n')
    if args.format == 'onnx':
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            parser.exit(1, f'{error.name} is not installed: pip install -r requirements/export.txt\n')

    warnings.simplefilter('ignore')  # of toolboxes and exporters, about themselves
    logging.getLogger('onnxscript').setLevel(logging.ERROR)
    model = build(parser, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images = torch.randn(TRACED if args.dynamic else (1, 3, *args.shape))
    # Weights beyond 2 GB lie in a second file of ONNX, which the first calls by its name.
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder, torch.no_grad():
        path = Path(folder, args.out.name)
        try:
            run = EXPORTERS[args.format](model, images, args.dynamic, path, args.opset)
            for shape in CHECKED if args.dynamic else (images.shape,):
                x = torch.randn(shape)
                error = error_of(run(x), model(x))
                print(f'{"x".join(map(str, shape))}: differs from PyTorch by {error:.1e}')
                if not error < TOLERANCE:
                    raise ValueError(f'an output differs by {error:.1e}, at most {TOLERANCE} is allowed')
        except Exception as error:  # whatever an exporter makes of what it does not know
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            sizes = ' for every size' if args.dynamic else ''
            parser.exit(1, f'{args.config} cannot be exported as {args.format}{sizes}: {reason[:400]}\n')
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == path):
            os.replace(file, args.out.parent / file.name)
    print(f'{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB')


if __name__ == '__main__':
    main()
