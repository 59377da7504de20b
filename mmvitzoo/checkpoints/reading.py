"""Files to flat state dicts, without ever executing what a file asks for."""

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any, Dict, Mapping, Union
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import print_log
from safetensors.torch import load_file
from torch import Tensor

from .unpickling import ArrayUnpickler, TorchUnpickler

# Where training frameworks put the weights, in the order in which we look.
WRAPPERS = ('state_dict', 'model', 'model_state', 'model_ema', 'state_dict_ema')


class CheckpointError(ValueError):
    """A file that is no checkpoint we can read, or weights that do not belong to a model."""

    def __init__(self, message: str) -> None:
        # Keys in a file may have any length and any characters; the message is one line.
        super().__init__(''.join(x if x.isprintable() else ascii(x)[1:-1] for x in message[:1000])[:1000])


def load(path: Union[str, Path]) -> Dict[str, Tensor]:
    """Reads the weights of a checkpoint file.

    The format is told from the content: PyTorch (``.pth``, ``.pt``, ``.bin``; zip or legacy),
    safetensors, or a pickle of NumPy arrays (Detectron2's ``.pkl``). Weights are unwrapped from
    ``state_dict``, ``model``, ``model_state``, ``model_ema`` or ``state_dict_ema``, in this order,
    and a ``module.`` prefix is taken off. Nothing in the file is executed, and how much memory
    it takes up is a matter of its size, not of what it claims.

    Args:
        path: A local file, or an http(s) address, which is downloaded once to torch's hub cache.

    Returns:
        Tensors on the CPU by key.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is truncated, of another kind, asks for code to be executed, claims
            more data than it has, or cannot be downloaded.
    """
    file = _local(str(path))
    try:
        return _unwrap(_read(file))
    except Exception as error:  # whatever a broken file makes its parser raise
        if file != str(path):
            os.unlink(file)  # not to be taken for the download next time
        if isinstance(error, CheckpointError):
            raise CheckpointError(f'{path}: {error}') from error.__cause__
        reason = error if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise CheckpointError(f'{path}: cannot be read as a checkpoint: {reason}') from error


def _local(path: str) -> str:
    url = urlparse(path)
    if url.scheme in ('http', 'https'):
        # Addresses of different files often end alike.
        name = f'{hashlib.sha256(path.encode()).hexdigest()[:8]}-{os.path.basename(url.path)}'
        target = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
        if not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                torch.hub.download_url_to_file(path, target)
            except OSError as error:
                raise CheckpointError(f'{path}: cannot be downloaded: {error}') from error
        return target
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such checkpoint file (a local file or an http(s) address is allowed)')
    return path


def _read(path: str) -> Any:
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        start = file.read(16)
        file.seek(0)
        if start.startswith(b'PK\x03\x04'):
            return _read_torch(file, size)
        if torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little') in start:
            return _read_legacy_torch(file, size)
        if start[8:9] == b'{':
            return load_file(path)
        if start.startswith(b'\x80'):
            return ArrayUnpickler(file, size).load()
    raise CheckpointError(f'is neither a PyTorch checkpoint nor safetensors nor a pickle; it starts with {start!r}')


def _read_torch(file: IO[bytes], size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        root = names[0].split('/')[0]

        def record(name: str) -> bytes:
            info = archive.getinfo(f'{root}/{name}')
            if info.compress_type != zipfile.ZIP_STORED:  # a few bytes could become any number
                raise CheckpointError(f'is a compressed archive, which PyTorch does not write: {info.filename}')
            return archive.read(info)

        if f'{root}/constants.pkl' in names:
            raise CheckpointError('is a TorchScript program, not a checkpoint')
        if f'{root}/byteorder' in names and record('byteorder') != b'little':
            raise CheckpointError('was written by a big-endian machine')
        unpickler = TorchUnpickler(io.BytesIO(record('data.pkl')), size)
        content = unpickler.load()
        for key, storage in unpickler.storages.items():
            _fill(storage, record(f'data/{key}'))
    return content


def _read_legacy_torch(file: IO[bytes], size: int) -> Any:
    """Five pickles one after the other, then the data of the storages."""
    for _ in ('magic number', 'version', 'system'):
        ArrayUnpickler(file, size).load()
    unpickler = TorchUnpickler(file, size)
    content = unpickler.load()
    keys = ArrayUnpickler(file, size).load()
    if keys != sorted(unpickler.storages):
        raise CheckpointError('lacks the data of some tensors')
    for key in keys:
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(8), 'little') != len(storage):
            raise CheckpointError('has another number of values than its tensors claim')
        _fill(storage, file.read(len(storage) * storage.element_size()))
    return content


def _fill(storage: Tensor, data: bytes) -> None:
    target = storage.view(torch.uint8).numpy()
    if len(data) != len(target):
        raise CheckpointError(f'has {len(data)} bytes of data where its tensors claim {len(target)}')
    target[:] = np.frombuffer(data, np.uint8)


def _unwrap(content: Any) -> Dict[str, Tensor]:
    depth = 0
    while isinstance(content, Mapping):
        inside = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        if len(inside) > 1:
            print_log(f'Checkpoint with {" and ".join(inside)}: reading {inside[0]}', logger='current')
        content = content[inside[0]]
        depth += 1
        if depth > len(WRAPPERS):
            raise CheckpointError(f'nests {inside[0]} without end')
    found = list(content) if isinstance(content, Mapping) else type(content).__name__
    weights, others = {}, []
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(key, str) and isinstance(value, Tensor):
            weights[key] = value
        else:
            others.append(repr(key))
    if not weights:
        raise CheckpointError(f'holds no weights, but {str(found)[:200]}')
    if others:
        print_log(f'Left out of the checkpoint, since no tensors: {", ".join(others)}', logger='current')
    if all(key.startswith('module.') for key in weights):
        weights = {key[len('module.') :]: value for key, value in weights.items()}
    return weights
