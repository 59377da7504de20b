"""Exports a model: export.py CONFIG [CHECKPOINT] --format onnx|torchscript|exported-program --out FILE.

The exported model takes normalized images (B, C, H, W), as the data_preprocessor of the model returns them.
Classifiers return logits (B, classes). Segmentors return logits (B, classes, H, W) in the size of the image. Detectors
return the feature maps of the neck, or of the backbone if there is no neck. With --dynamic, the file accepts any batch
and image size; otherwise it accepts single images of --shape.

Before the file is saved, its outputs are compared with those of the model, for three sizes with --dynamic. Requires
PyTorch >= 2.9; ONNX also requires `pip install -r requirements/export.txt`.
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
from mmvitzoo.models.backbones.base import image_channels

FORMATS = dict(onnx='.onnx', torchscript='.pt', **{'exported-program': '.pt2'})
TOLERANCE = 1e-4  # relative error of an output
# Input for tracing: at no stride are the sides of a feature map multiples of a window, so that padding is traced.
TRACE_SHAPE = (2, 3, 230, 294)
CHECK_SHAPES = ((1, 3, 320, 256), (2, 3, 227, 373), (3, 3, 256, 448))


class AdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, which can be exported for dynamic sizes.

    Args:
        size: Output size, (H', W').
    """

    def __init__(self, size: Sequence[int]):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        rows, cols = (pool_matrix(x.shape[i], out, x) for i, out in zip((2, 3), self.size))
        return rows @ x @ cols.T


def pool_matrix(size: int, out: int, like: Tensor) -> Tensor:
    """Returns the weight of each pixel in the mean of each bin, (out, size)."""
    pixels, bins = (torch.arange(n, device=like.device)[:, None] for n in (size, out))
    inside = (bins * size // out <= pixels.T) & (((bins + 1) * size + out - 1) // out > pixels.T)
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class DynamicUpsample(nn.Module):
    """Replacement for MMSegmentation's ``Upsample``, which converts sizes to constants."""

    def __init__(self, upsample: nn.Module):
        super().__init__()
        self.factor = int(upsample.scale_factor)
        self.options = dict(mode=upsample.mode, align_corners=upsample.align_corners)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, factor * H, factor * W)."""
        return nn.functional.interpolate(x, (self.factor * x.shape[2], self.factor * x.shape[3]), **self.options)


class ExportModel(nn.Module):
    """Wrapper of a model of the three toolboxes whose ``forward`` is exported."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        for parent in list(model.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.AdaptiveAvgPool2d):
                    size = module.output_size
                    setattr(parent, name, AdaptivePool((size, size) if isinstance(size, int) else size))
                elif type(module).__name__ == 'Upsample' and module.scale_factor:
                    setattr(parent, name, DynamicUpsample(module))

    def output_names(self) -> List[str]:
        """Returns the names of the outputs of ``forward``."""
        if hasattr(self.model, 'decode_head') or hasattr(self.model, 'head'):
            return ['logits']
        with torch.no_grad():
            return [f'map{i}' for i in range(len(self(random_images(self, TRACE_SHAPE))))]

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """(B, C, H, W) -> logits or feature maps."""
        features = self.model.extract_feat(images)
        if hasattr(self.model, 'decode_head'):
            logits = self.model.decode_head(features)
            size = images.shape[2:]
            aligned = self.model.decode_head.align_corners
            return (nn.functional.interpolate(logits, size, mode='bilinear', align_corners=aligned),)
        if hasattr(self.model, 'head'):
            return (self.model.head(features),)
        return tuple(features)


def random_images(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Returns random images of a shape (B, 3, H, W), with the channels of a model in place of 3."""
    return torch.randn(shape[0], image_channels(model), *shape[2:])


def export_onnx(model: ExportModel, images: Tensor, dynamic: bool, path: Path, opset: int) -> Callable:
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
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # it keeps the memory of the largest image
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {'images': x.numpy()})]


def export_torchscript(model: ExportModel, images: Tensor, dynamic: bool, path: Path, opset: int) -> Callable:
    torch.jit.trace(model, images, check_trace=False).save(str(path))
    return torch.jit.load(str(path))


def export_program(model: ExportModel, images: Tensor, dynamic: bool, path: Path, opset: int) -> Callable:
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC) if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=(sizes,))
    if dynamic:
        shape = next(node.meta['val'] for node in program.graph.nodes if node.name == 'images').shape
        minimum = [program.range_constraints[shape[i].node.expr].lower for i in (2, 3)]
        print(f'accepts images of at least {minimum[0]} x {minimum[1]} pixels')
        # PyTorch also guards remainders of pooling and memory formats of the example input, on which no operation
        # depends. The check below runs the program with other sizes.
        program._guards_code = []
    torch.export.save(program, path)
    return torch.export.load(path).module()


EXPORTERS = dict(zip(FORMATS, (export_onnx, export_torchscript, export_program)))


def build(parser: argparse.ArgumentParser, args: argparse.Namespace) -> ExportModel:
    """Builds the model of the config and loads the checkpoint, if there is one."""
    try:
        model = load_model(args.config, args.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f'{error}\n')
    if not args.checkpoint:
        print('no checkpoint: the weights are random')
    return ExportModel(model.requires_grad_(False))


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest relative error in the L2 norm of any output; inf if the shapes differ."""
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return float('inf')
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(outputs, expected))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='path of a config or name from mmvitzoo.list_models()')
    parser.add_argument('checkpoint', nargs='?', help='path or URL of a checkpoint (default: random weights)')
    parser.add_argument('--format', choices=FORMATS, required=True, help='format of the file')
    parser.add_argument('--out', type=Path, required=True, help='file to write')
    parser.add_argument('--dynamic', action='store_true', help='accept any batch and image size')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='image size without --dynamic')
    parser.add_argument('--opset', type=int, default=18, help='ONNX opset, 18 to 21 (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing file')
    args = parser.parse_args()
    if args.dynamic == bool(args.shape):
        parser.error('give either --dynamic or --shape H W')
    if args.shape and min(args.shape) < 32:
        parser.error(f'--shape: H and W must be at least 32 pixels, got {args.shape}')
    if not 18 <= args.opset <= 21:
        parser.error(f'--opset must be 18 to 21, got {args.opset}')
    if args.out.suffix != FORMATS[args.format]:
        parser.error(f'--out: the suffix for {args.format} must be {FORMATS[args.format]}, got {args.out}')
    if args.out.exists() and not args.overwrite:
        parser.error(f'{args.out} exists already; --overwrite replaces it')
    if digit_version(torch.__version__) < digit_version('2.9'):
        parser.exit(1, f'export requires PyTorch >= 2.9, found {torch.__version__}\n')
    if args.format == 'onnx':
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            parser.exit(1, f'{error.name} is not installed: pip install -r requirements/export.txt\n')

    warnings.simplefilter('ignore')  # toolboxes and exporters warn about their own internals
    logging.getLogger('onnxscript').setLevel(logging.ERROR)
    model = build(parser, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images = random_images(model, TRACE_SHAPE if args.dynamic else (1, 3, *args.shape))
    # ONNX stores weights of more than 2 GB in a second file, whose name the first one contains.
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder, torch.no_grad():
        path = Path(folder, args.out.name)
        try:
            run = EXPORTERS[args.format](model, images, args.dynamic, path, args.opset)
            for shape in CHECK_SHAPES if args.dynamic else (images.shape,):
                x = random_images(model, shape)
                error = relative_error(run(x), model(x))
                print(f'{"x".join(map(str, x.shape))}: relative error {error:.1e} to PyTorch')
                if not error < TOLERANCE:
                    raise ValueError(f'relative error {error:.1e} of an output, must be below {TOLERANCE}')
        except Exception as error:  # exporters raise many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            sizes = ' for every size' if args.dynamic else ''
            parser.exit(1, f'{args.config} cannot be exported as {args.format}{sizes}: {reason[:400]}\n')
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == path):
            os.replace(file, args.out.parent / file.name)
    print(f'{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB')


if __name__ == '__main__':
    main()
