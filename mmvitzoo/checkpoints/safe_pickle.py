"""Reads pickled weights without executing anything that a file asks for.

``torch.load(weights_only=True)`` is not enough for files of unknown origin:

- It was broken twice: CVE-2025-32434 (torch <= 2.5.1) and CVE-2026-24747 (torch < 2.10). This package supports
  torch >= 2.1.
- It allocates as much memory as a file claims to need.
- It does not read Detectron2's pickles of NumPy arrays.

The unpicklers here know tensors, arrays and plain containers. A name in a pickle is looked up in a closed list of
stand-ins and never imported. The memory for tensors is at most twice the size of the file.

:func:`trust_mmengine_checkpoints` is for another purpose: MMEngine resumes from its own files by ``torch.load``.
"""

import argparse
import io
import pickle
import re
import struct
import zipfile
from typing import IO, Any, Dict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version
from torch import Tensor

STORAGES = {
    'torch.BFloat16Storage': torch.bfloat16,
    'torch.BoolStorage': torch.bool,
    'torch.ByteStorage': torch.uint8,
    'torch.CharStorage': torch.int8,
    'torch.ComplexDoubleStorage': torch.complex128,
    'torch.ComplexFloatStorage': torch.complex64,
    'torch.DoubleStorage': torch.float64,
    'torch.FloatStorage': torch.float32,
    'torch.HalfStorage': torch.float16,
    'torch.IntStorage': torch.int32,
    'torch.LongStorage': torch.int64,
    'torch.ShortStorage': torch.int16,
}
NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=])(\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,200})\), \}\s*"
)
OPCODES = (
    'PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BINPERSID '
    'NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT '
    'BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 '
    'EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT '
    'BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE'
)


def refuse(request: str) -> None:
    """Stops reading a file.

    Args:
        request: The thing that the file asked for.

    Raises:
        pickle.UnpicklingError: Always.
    """
    raise pickle.UnpicklingError(f'refused {request}')


class TrainingState:
    """Stand-in for objects that a training run stored beside its weights."""

    min = max = mean = current = None  # HistoryBuffer's statistics, which its pickles refer to

    def __init__(self, *args: Any) -> None:
        pass


class Dtype:
    """Stand-in for ``numpy.dtype``, whose pickled state could be anything."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch('b1|[iu][1248]|f[248]|c8|c16', code):
            refuse(f'an array of {code!r}')
        self.value = np.dtype(code)


def history_method(owner: Any, name: Any) -> Any:
    """Replaces ``getattr``, which MMEngine's checkpoints call for the statistics of a HistoryBuffer alone."""
    known = owner is HistoryBuffer or owner is TrainingState
    if not known or name not in ('min', 'max', 'mean', 'current'):
        refuse('to execute getattr')
    return getattr(owner, name)


def _tuple(x: Any) -> tuple:
    # A tensor would be iterated over, and the message of an error would print it.
    if type(x) is not tuple:
        refuse(f'{type(x).__name__} for tuple')
    return x


def _check_empty(shape: Any) -> None:
    # NumPy always pickles an empty array first and fills it with its state.
    if shape != (0,):
        refuse('an array that claims a shape before its data')


def _empty_tensor(array_type: Any, shape: Any, code: Any) -> Tensor:
    _check_empty(shape)
    return torch.empty(0)


def _empty_dict() -> Dict[str, Any]:
    return {}


def _empty_bytes() -> bytes:
    return b''


def _parameter(data: Any, *args: Any) -> Any:
    return data


NAMES = {
    **STORAGES,
    **{str(dtype): TrainingState for dtype in STORAGES.values()},
    '__builtin__.bytes': _empty_bytes,  # its name in pickles of protocol 2
    '__builtin__.getattr': history_method,
    '__builtin__.set': TrainingState,
    'argparse.Namespace': TrainingState,
    'builtins.getattr': history_method,
    'builtins.set': TrainingState,
    'collections.Counter': TrainingState,
    'collections.OrderedDict': _empty_dict,
    'mmengine.logging.history_buffer.HistoryBuffer': TrainingState,
    'numpy.dtype': Dtype,
    'numpy.ndarray': 'ndarray',  # an argument of every array, never called
    'torch.Size': TrainingState,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch.device': TrainingState,
}


class Ignored:
    """Stand-in for any object beside the weights in a file of Lightning: it does nothing, whatever is asked of it."""

    def __init__(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any) -> 'Ignored':
        return self

    def append(self, item: Any) -> None:
        """Ignores an item."""

    extend = append


class _Opcodes(dict):
    def __missing__(self, code: int) -> None:
        refuse(f'opcode {bytes([code])!r}')


class ArrayUnpickler(pickle._Unpickler):
    """Reads Detectron2's pickles: NumPy arrays, as tensors, in plain containers.

    Args:
        file: Open for reading.
        size: Bytes in the file.
        ignore_unknown: Take :class:`Ignored` for an unknown name instead of refusing the file.
    """

    dispatch = _Opcodes()
    for _name in OPCODES.split():
        dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _name)[0]]

    def __init__(self, file: IO[bytes], size: int, ignore_unknown: bool = False) -> None:
        super().__init__(file, encoding='latin1')  # Python 2 wrote such strings
        self.ignore_unknown = ignore_unknown
        self.remaining = 2 * size  # protocol 2 stores bytes as text: they are copied once as bytes, once as an array
        self.names = {
            **NAMES,
            '_codecs.encode': self._encode,
            'torch._utils._rebuild_tensor': self._tensor,
            'torch._utils._rebuild_tensor_v2': self._tensor,
        }
        for module in ('numpy.core', 'numpy._core'):
            self.names[f'{module}.multiarray._reconstruct'] = _empty_tensor
            self.names[f'{module}.multiarray.scalar'] = self._scalar
            self.names[f'{module}.numeric._frombuffer'] = self._array

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a name; imports nothing."""
        try:
            return self.names[f'{module}.{name}']
        except KeyError:
            if self.ignore_unknown:
                return Ignored
            refuse(f'to execute {module}.{name}')

    def _claim(self, size: int) -> None:
        self.remaining -= size
        if self.remaining < 0:
            raise pickle.UnpicklingError('it claims more data than the file has')

    def _encode(self, text: str, encoding: str) -> bytes:
        # Protocol 2 stores bytes as text and a call of this function.
        if encoding != 'latin1':
            refuse('an encoding other than latin1')
        self._claim(len(text))
        return text.encode(encoding)

    def _array(self, data: Any, dtype: Dtype, shape: tuple, order: str = 'C') -> Tensor:
        if isinstance(data, str):  # bytes of Python 2
            data = data.encode('latin1')
        array = np.frombuffer(data, dtype.value).reshape(_tuple(shape), order=order)
        self._claim(array.nbytes)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder('=')))  # a writable copy

    def _scalar(self, dtype: Dtype, data: Any) -> Tensor:
        return self._array(data, dtype, ())

    def _tensor(
        self, storage: Tensor, offset: int, size: tuple, stride: tuple, requires_grad: bool = False, hooks: Any = None
    ) -> Tensor:
        tensor = storage.as_strided(size, stride, offset)
        if tensor.numel() > storage.numel():
            refuse(f'a tensor of {tensor.numel()} items made of {storage.numel()}')
        return tensor

    def _set_item(self, key: Any, value: Any) -> None:
        # Other keys name no weights, and hashing a nested tuple can crash Python or take forever.
        if type(self.stack[-1]) is dict and isinstance(key, (str, bytes, int, float, type(None))):
            self.stack[-1][key] = value

    def load_setitem(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_item(key, value)

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        """SETITEMS."""
        items = self.pop_mark()
        for i in range(0, len(items), 2):
            self._set_item(items[i], items[i + 1])

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_reduce(self) -> None:
        """REDUCE: calls the stand-in for a name."""
        args = _tuple(self.stack.pop())
        self.stack[-1] = self.stack[-1](*args)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        """NEWOBJ: makes training state and nothing else."""
        self.stack.pop()
        owner = self.stack.pop()
        if owner is not TrainingState and owner is not Ignored:
            refuse('a new object of a class that is built in another way')
        self.append(owner())

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        """BUILD: fills arrays and completes their types."""
        owner = self.stack[-2]
        if isinstance(owner, Dtype):
            owner.value = owner.value.newbyteorder(_tuple(self.stack.pop())[1])
        elif isinstance(owner, Tensor):
            _, shape, dtype, is_fortran, data = _tuple(self.stack.pop())
            owner.data = self._array(data, dtype, shape, 'F' if is_fortran else 'C')
        else:
            attributes = self.stack.pop()
            # torch keeps the metadata of a state dict in an attribute. Other attributes are no weights.
            if type(owner) is dict and type(attributes) is dict and type(attributes.get('_metadata')) is dict:
                owner['_metadata'] = attributes['_metadata']

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: reads the data before it allocates memory, unlike Python's own."""
        self.append(bytearray(self.read(*struct.unpack('<Q', self.read(8)))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class TorchUnpickler(ArrayUnpickler):
    """Reads the pickles in PyTorch's files, whose tensors are views of storages that follow elsewhere.

    Attributes:
        storages: Storages by their key in the pickle, still to be filled.
    """

    def __init__(self, file: IO[bytes], size: int, ignore_unknown: bool = False) -> None:
        super().__init__(file, size, ignore_unknown)
        self.storages: Dict[str, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        """Returns a storage, to be filled later."""
        if type(pid) is not tuple or pid[0] != 'storage' or pid[5:] not in ((), (None,)) or type(pid[2]) is not str:
            refuse('a persistent id that is no storage')
        _, dtype, key, _, numel = pid[:5]
        if key not in self.storages:
            self._claim(numel * torch.empty(0, dtype=dtype).element_size())
            self.storages[key] = torch.empty(numel, dtype=dtype)
        return self.storages[key]


def read_arrays(file: IO[bytes], size: int) -> Any:
    """Reads a pickle of NumPy arrays, as tensors, from a file of ``size`` bytes."""
    return ArrayUnpickler(file, size).load()


def read_torch_zip(file: IO[bytes], size: int) -> Any:
    """Reads an archive that ``torch.save`` wrote: a pickle and the data of its storages, ``size`` bytes in all."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        root = names[0].split('/')[0]

        def read_member(name: str) -> bytes:
            info = archive.getinfo(f'{root}/{name}')
            if info.compress_type != zipfile.ZIP_STORED:  # a few bytes could become gigabytes
                refuse(f'a compressed archive, which PyTorch does not write: {info.filename}')
            return archive.read(info)

        if f'{root}/constants.pkl' in names:
            refuse('a TorchScript program, which is not a checkpoint')
        if f'{root}/byteorder' in names and read_member('byteorder') != b'little':
            refuse('data of a big-endian machine')
        data = read_member('data.pkl')
        # Lightning stores hyperparameters and callbacks, objects of any class, beside the weights.
        unpickler = TorchUnpickler(io.BytesIO(data), size, b'pytorch-lightning_version' in data)
        content = unpickler.load()
        for key, storage in unpickler.storages.items():
            _fill(storage, read_member(f'data/{key}'))
    return content


def is_npz(file: IO[bytes]) -> bool:
    """Returns whether a zip archive holds NumPy's files alone; the position in the file is kept."""
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # parsers raise anything on a broken file
        return False
    finally:
        file.seek(start)
    return bool(names) and all(name.endswith('.npy') for name in names)


def read_npz(file: IO[bytes], size: int) -> Dict[str, Tensor]:
    """Reads NumPy's archive of arrays from a file of ``size`` bytes, without pickles in it.

    Arrays may be compressed. Weights shrink by less than a tenth, so arrays that claim more than 16 times the bytes of
    the file are refused.
    """
    arrays: Dict[str, Tensor] = {}
    remaining = 16 * size
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            remaining -= info.file_size
            if remaining < 0:
                raise pickle.UnpicklingError('it claims more data than the file has')
            with archive.open(info) as member:
                data = member.read(info.file_size)
            arrays[info.filename[: -len('.npy')]] = _read_npy(data)
    return arrays


def _read_npy(data: bytes) -> Tensor:
    # NumPy's own reader parses the header as Python, and unpickles objects if asked to.
    length = 2 if data[6:7] == b'\x01' else 4
    start = 8 + length
    end = start + int.from_bytes(data[8:start], 'little')
    header = NPY_HEADER.fullmatch(data[start:end].decode('latin1'))
    if not data.startswith(b'\x93NUMPY') or header is None:
        refuse('an array with another header than NumPy writes for numbers')
    order, code, is_fortran, shape = header.groups()
    dtype = Dtype(code).value.newbyteorder(order if order in '<>' else '=')
    sizes = tuple(int(size) for size in shape.replace(',', ' ').split())
    array = np.frombuffer(data[end:], dtype).reshape(sizes, order='F' if is_fortran == 'True' else 'C')
    return torch.from_numpy(array.astype(dtype.newbyteorder('=')))


def read_torch_legacy(file: IO[bytes], size: int) -> Any:
    """Reads the older format of ``torch.save``: five pickles, then the data of the storages, ``size`` bytes in all."""
    for _ in ('magic number', 'version', 'system'):
        ArrayUnpickler(file, size).load()
    unpickler = TorchUnpickler(file, size)
    content = unpickler.load()
    keys = ArrayUnpickler(file, size).load()
    if keys != sorted(unpickler.storages):
        raise pickle.UnpicklingError('it lacks the data of some tensors')
    for key in keys:
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(8), 'little') != len(storage):
            raise pickle.UnpicklingError('it has another number of values than its tensors claim')
        _fill(storage, file.read(len(storage) * storage.element_size()))
    return content


def _fill(storage: Tensor, data: bytes) -> None:
    target = storage.view(torch.uint8).numpy()
    if len(data) != len(target):
        raise pickle.UnpicklingError(f'it has {len(data)} bytes of data where its tensors claim {len(target)}')
    target[:] = np.frombuffer(data, np.uint8)


# ---------------------------------------------------------------- resuming from MMEngine's own checkpoints


def empty_array(array_type: Any, shape: Any, code: Any) -> np.ndarray:
    """Replaces NumPy's ``_reconstruct``, which is only ever asked for an empty array."""
    if array_type is not np.ndarray:
        refuse('an array of another class than ndarray')
    _check_empty(shape)
    return np.empty((0,), np.int8)


def trusted_names() -> Dict[str, Any]:
    """Returns the names besides tensors in MMEngine's checkpoints, and the object that each stands for.

    Each object builds plain data, or replaces a function and refuses all but the one use that MMEngine's files make
    of it.
    """
    names = {
        'builtins.getattr': history_method,
        '__builtin__.getattr': history_method,  # its name in pickles of protocol 2
        'argparse.Namespace': argparse.Namespace,
        'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': np.dtype,
    }
    scalar = np.float64(0).__reduce__()[0]  # its module has another name in each NumPy
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        names[f'{module}._reconstruct'] = empty_array
        names[f'{module}.scalar'] = scalar
    for code in '?bBhHiIlLqQefd':
        dtype = type(np.dtype(code))
        names[f'{dtype.__module__}.{dtype.__qualname__}'] = dtype
    return names


def trust_mmengine_checkpoints() -> None:
    """Lets MMEngine load the checkpoints that it wrote itself, on torch >= 2.6.

    There ``torch.load`` reads weights only, while MMEngine (0.10.7 and before) also stores its message hub: history
    buffers of NumPy arrays. Their names are admitted, and no others. Older torch has no such restriction.
    """
    if digit_version(torch.__version__) >= digit_version('2.6.0'):
        torch.serialization.add_safe_globals([(target, name) for name, target in trusted_names().items()])
