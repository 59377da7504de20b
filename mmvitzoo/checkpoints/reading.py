"""Reads checkpoint files of every format as flat state dicts."""

import hashlib
import json
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank, is_distributed
from mmengine.logging import print_log
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..models.backbones.vit_weights import METADATA_KEY, backbone_metadata
from .safe_pickle import is_npz, read_arrays, read_npz, read_torch_legacy, read_torch_zip

# Keys under which training frameworks store the weights, in the order of the search.
WRAPPERS = ('state_dict', 'model', 'model_state', 'model_ema', 'state_dict_ema', 'teacher', 'student')
# Names of the only attribute in wrappers: of data parallelism, and of many Lightning modules.
COMMON_PREFIXES = ('module.', 'model.')
# Names that torch.compile, FSDP and activation checkpointing insert before the module that they wrap.
PREFIXES = re.compile(r'\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# Counters beside the weights of a moving average, of MMEngine and of torch.
EMA_COUNTERS = ('steps', 'n_averaged')


class CheckpointError(ValueError):
    """A file that is no readable checkpoint, or weights that do not belong to a model."""

    def __init__(self, message: str) -> None:
        # Keys in a file may have any length and any characters; the message is one line.
        super().__init__(''.join(x if x.isprintable() else ascii(x)[1:-1] for x in message[:1000])[:1000])


def load(path: Union[str, Path], key: Optional[str] = None) -> Dict[str, Tensor]:
    """Reads the weights of a checkpoint file.

    The content tells the format: PyTorch (``.pth``, ``.pt``, ``.bin``; zip or legacy), safetensors, a pickle of NumPy
    arrays (Detectron2's ``.pkl``), or NumPy's ``.npz``. Weights are unwrapped from ``state_dict``, ``model``,
    ``model_state``, ``model_ema``, ``state_dict_ema``, ``teacher`` or ``student``, in this order. Prefixes of
    wrappers, such as ``module.`` and ``_orig_mod.``, are removed. Nothing in the file is executed. The memory depends
    on the size of the file, not on the sizes that the file claims.

    Args:
        path: A local file, or an http(s) address, which is downloaded once to torch's hub cache.
        key: Entry of the file that holds the weights, such as ``'model_ema'``, or else the first part of the keys to
            read, such as ``'student'``, which is removed. None searches as above.

    Returns:
        Tensors on the CPU by key.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is truncated, has another format, asks for code to be executed, claims more data
            than it has, cannot be downloaded, or has no ``key``.
    """
    url = str(path) if is_url(path) else None
    file = download(url) if url else str(path)
    if not os.path.isfile(file):
        raise FileNotFoundError(f'{path}: no such checkpoint file (a local file or an http(s) address is allowed)')
    try:
        return unwrap(_read(file), key)
    except Exception as error:  # parsers raise anything on a broken file
        if url:
            Path(file).unlink(missing_ok=True)  # the next call would take it for the download
        if isinstance(error, CheckpointError):
            raise CheckpointError(f'{path}: {error}') from error.__cause__
        reason = error if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise CheckpointError(f'{path}: cannot be read as a checkpoint: {reason}') from error


def is_url(path: Union[str, Path]) -> bool:
    """Returns True for an http(s) address."""
    return urlparse(str(path)).scheme in ('http', 'https')


def download(url: str) -> str:
    """Downloads a file to torch's hub cache, unless it is there.

    Args:
        url: An http(s) address.

    Returns:
        Path of the local file.

    Raises:
        CheckpointError: The file cannot be downloaded.
    """
    target = _cache_path(url)
    if not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, target)
        except OSError as error:
            raise CheckpointError(f'{url}: cannot be downloaded: {error}') from error
    return target


def download_once_per_node(url: str) -> str:
    """Downloads a file in the first process of each node, while the others wait.

    Every process of a distributed run has to call it. Afterwards :func:`load` finds the file in the cache.

    Args:
        url: An http(s) address.

    Returns:
        Path of the local file.

    Raises:
        CheckpointError: The file cannot be downloaded; raised in every process of the node.
    """
    rank = int(os.environ.get('LOCAL_RANK', get_rank())) if is_distributed() else 0
    try:
        if rank == 0:
            download(url)
    finally:
        barrier()  # reached after a failure as well: the other processes wait here
    if not os.path.exists(_cache_path(url)):
        raise CheckpointError(f'{url}: the first process of this node could not download it')
    return _cache_path(url)


def _cache_path(url: str) -> str:
    # The names of different files often end alike.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{os.path.basename(urlparse(url).path)}'
    return os.path.join(torch.hub.get_dir(), 'checkpoints', name)


def is_torch_file(path: Union[str, Path]) -> bool:
    """Returns whether a file was written by ``torch.save``."""
    with open(path, 'rb') as file:
        start = file.read(16)
        return (_is_torch_zip(start) and not is_npz(file)) or _is_torch_legacy(start)


def _is_torch_zip(start: bytes) -> bool:
    return start.startswith(b'PK\x03\x04')


def _is_torch_legacy(start: bytes) -> bool:
    return torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little') in start


def _read(path: str) -> Any:
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        start = file.read(16)
        file.seek(0)
        if _is_torch_zip(start):
            return read_npz(file, size) if is_npz(file) else read_torch_zip(file, size)
        if _is_torch_legacy(start):
            return read_torch_legacy(file, size)
        if start[8:9] == b'{':
            weights = load_file(path)
            with safe_open(path, 'pt') as tensors:
                metadata = (tensors.metadata() or {}).get(METADATA_KEY)
            if metadata is not None:
                weights['_metadata'] = json.loads(metadata)
            return weights
        if start.startswith(b'\x80'):
            return read_arrays(file, size)
    raise CheckpointError(f'is neither a PyTorch checkpoint nor safetensors nor a pickle; it starts with {start!r}')


def unwrap(content: Any, wanted: Optional[str] = None) -> Dict[str, Tensor]:
    """Returns the weights in the content of a checkpoint file.

    Args:
        content: State dict, or a dict that holds one under a key of :data:`WRAPPERS`.
        wanted: Entry or first part of the keys to read, see :func:`load`.

    Returns:
        Tensors by key, without the prefixes of ``torch.compile``, FSDP, activation checkpointing and data parallelism.
        Metadata of backbones of this package are kept, as ``nn.Module.state_dict`` returns them.

    Raises:
        CheckpointError: There are no weights.
    """
    depth = 0
    while isinstance(content, Mapping):
        if wanted is not None and isinstance(content.get(wanted), Mapping):
            content, wanted = content[wanted], None
            continue
        inside = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        if len(inside) > 1:
            print_log(f'Checkpoint with {" and ".join(inside)}: reading {inside[0]}', logger='current')
        content = content[inside[0]]
        depth += 1
        if depth > len(WRAPPERS):
            raise CheckpointError(f'nests {inside[0]} without end')
    metadata = backbone_metadata(content)
    found = list(content) if isinstance(content, Mapping) else type(content).__name__
    weights, others = {}, []
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(key, str) and isinstance(value, Tensor):
            weights[PREFIXES.sub('', key)] = value
        elif key != '_metadata':
            others.append(repr(key))
    for prefix in COMMON_PREFIXES:
        if all(key.startswith(prefix) for key in weights if key not in EMA_COUNTERS):
            others += [repr(key) for key in weights if key in EMA_COUNTERS]
            weights = {key[len(prefix) :]: value for key, value in weights.items() if key not in EMA_COUNTERS}
    if wanted is not None:
        start = wanted.rstrip('.') + '.'
        weights = {key[len(start) :]: value for key, value in weights.items() if key.startswith(start)}
        if not weights:
            raise CheckpointError(
                f'has neither an entry {wanted!r} nor keys that start with it, but {str(found)[:200]}'
            )
    if not weights:
        raise CheckpointError(f'holds no weights, but {str(found)[:200]}')
    if others:
        print_log(f'Entries of the checkpoint that are no weights are ignored: {", ".join(others)}', logger='current')
    return with_metadata(weights, metadata)


def with_metadata(
    weights: Dict[str, Tensor], metadata: Optional[Mapping[str, Any]], module: str = 'backbone'
) -> Dict[str, Tensor]:
    """Returns weights that carry metadata of a backbone as ``nn.Module.state_dict`` does.

    Args:
        weights: Tensors by key.
        metadata: Arguments of the backbone, see :attr:`mmvitzoo.models.PlainViT.metadata`; None returns ``weights``.
        module: Name of the backbone in the model, empty for the backbone alone.
    """
    if metadata is None:
        return weights
    weights = OrderedDict(weights)
    weights._metadata = {module: {METADATA_KEY: dict(metadata)}}
    return weights
