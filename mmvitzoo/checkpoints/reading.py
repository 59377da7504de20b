"""Files to flat state dicts, without ever executing what a file asks for."""

import codecs
import collections
import hashlib
import os
import pickle
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Mapping, Union
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.utils import digit_version
from safetensors.torch import load_file
from torch import Tensor

from .trusted import empty_array, trusted_names

# Where training frameworks put the weights, in the order in which we look.
WRAPPERS = ('state_dict', 'model', 'model_state', 'model_ema', 'state_dict_ema')


class CheckpointError(ValueError):
    """A file that is no checkpoint we can read, or weights that do not belong to a model."""


def load(path: Union[str, Path]) -> Dict[str, Tensor]:
    """Reads the weights of a checkpoint file.

    The format is told from the content: PyTorch (``.pth``, ``.pt``, ``.bin``; zip or legacy),
    safetensors, or a pickle of NumPy arrays (Detectron2's ``.pkl``). Weights are unwrapped from
    ``state_dict``, ``model``, ``model_state``, ``model_ema`` or ``state_dict_ema``, in this order,
    and a ``module.`` prefix is taken off. Nothing in the file is executed.

    Args:
        path: A local file, or an http(s) address, which is downloaded once to torch's hub cache.

    Returns:
        Tensors on the CPU by key.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is truncated, of another kind, asks for code to be executed, or
            cannot be downloaded.
    """
    file = _local(str(path))
    try:
        return _unwrap(_read(file))
    except Exception as error:  # whatever a broken file makes its parser raise
        if file != str(path):
            os.unlink(file)  # not to be taken for the download next time
        if isinstance(error, CheckpointError):
            raise CheckpointError(f'{path}: {error}') from error.__cause__
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f'{path}: cannot be read as a checkpoint: {reason[0]}') from error


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
    with open(path, 'rb') as file:
        start = file.read(16)
    if tarfile.is_tarfile(path):  # written before torch 0.1.10; torch extracts such archives unchecked
        raise CheckpointError('is a tar archive, not a checkpoint')
    if start.startswith(b'PK\x03\x04'):
        if 'constants.pkl' in torch._C.PyTorchFileReader(path).get_all_records():
            raise CheckpointError('is a TorchScript program, not a checkpoint')
        return _read_torch(path)
    if torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little') in start:
        return _read_torch(path)
    if start[8:9] == b'{':
        return load_file(path)
    if start.startswith(b'\x80'):
        with open(path, 'rb') as file:
            return ArrayUnpickler(file, encoding='latin1').load()
    raise CheckpointError(f'is neither a PyTorch checkpoint nor safetensors nor a pickle; it starts with {start!r}')


def _read_torch(path: str) -> Any:
    if digit_version(torch.__version__) >= digit_version('2.6.0'):
        return torch.load(path, map_location='cpu', weights_only=True)
    # Before 2.6, weights_only could be tricked and knows no MMEngine names.
    pickle_module = ModuleType('restricted')
    pickle_module.Unpickler = TorchUnpickler
    pickle_module.load = lambda file, **kwargs: TorchUnpickler(file, **kwargs).load()
    return torch.load(path, map_location='cpu', weights_only=False, pickle_module=pickle_module)


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'refused encoding {encoding!r}')
    return codecs.encode(text, encoding)


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler in which only the names in :attr:`names` mean anything."""

    names: Dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Args:
            module: As the pickle spells it.
            name: Within the module.

        Raises:
            pickle.UnpicklingError: It is none of :attr:`names`.
        """
        try:
            return self.names[f'{module}.{name}']
        except KeyError:
            raise pickle.UnpicklingError(f'refused to execute {module}.{name}') from None


class TorchUnpickler(RestrictedUnpickler):
    """For the pickles inside PyTorch files; torch itself resolves the storages."""

    names = {
        **trusted_names(),
        '_codecs.encode': _encode,
        'collections.OrderedDict': collections.OrderedDict,
        'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
        'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
        'torch.Size': torch.Size,
    }


def _array_in_place(data: Any, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """How pickles of protocol 5 spell an array; the data is there before the array."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)


class ArrayUnpickler(RestrictedUnpickler):
    """For Detectron2's pickles: NumPy arrays in plain containers."""

    names = {
        '_codecs.encode': _encode,
        'collections.OrderedDict': collections.OrderedDict,
        'numpy.ndarray': 'ndarray',  # named in every array, never to be called
        'numpy.dtype': np.dtype,
    }
    for _module in ('numpy.core', 'numpy._core'):
        names[f'{_module}.multiarray._reconstruct'] = empty_array
        names[f'{_module}.multiarray.scalar'] = trusted_names()[f'{_module}.multiarray.scalar']
        names[f'{_module}.numeric._frombuffer'] = _array_in_place


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
        if isinstance(value, (np.ndarray, np.generic)):
            value = torch.from_numpy(np.array(value))
        if isinstance(key, str) and isinstance(value, Tensor):
            weights[key] = value
        else:
            others.append(str(key))
    if not weights:
        raise CheckpointError(f'holds no weights, but {str(found)[:200]}')
    if others:
        print_log(f'Left out of the checkpoint, since no tensors: {", ".join(others)}', logger='current')
    if all(key.startswith('module.') for key in weights):
        weights = {key[len('module.') :]: value for key, value in weights.items()}
    return weights
