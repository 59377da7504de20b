"""A pickle reader that knows tensors and plain containers, and nothing else.

Python's own calls whatever a file names, sets attributes of anything, hashes any key and believes
every length: a few bytes run code, crash the process or fill its memory.
"""

import pickle
import re
import struct
from typing import IO, Any, Dict

import numpy as np
import torch
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
OPCODES = (
    'PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BINPERSID '
    'NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT '
    'BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 '
    'EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT '
    'BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE'
)


def refuse(what: str) -> None:
    """Ends the reading: ``pickle.UnpicklingError`` says what the file asked for."""
    raise pickle.UnpicklingError(f'refused {what}')


def _tuple(x: Any) -> tuple:
    """For where others would iterate over a tensor, or show in an error message what has no end."""
    if type(x) is not tuple:
        refuse(f'{type(x).__name__} for tuple')
    return x


class TrainingState:
    """Stands for what a training run stored beside its weights."""

    def __init__(self, *args: Any) -> None:
        pass


class Dtype:
    """Stands for NumPy's, whose state could be anything."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch('b1|[iu][1248]|f[248]|c8|c16', code):
            refuse(f'an array of {code!r}')
        self.value = np.dtype(code)


def _history_method(owner: Any, name: Any) -> TrainingState:
    """The only ``getattr`` that MMEngine's checkpoints make: the statistics of a HistoryBuffer."""
    if owner is not TrainingState or name not in ('min', 'max', 'mean', 'current'):
        refuse('to execute getattr')
    return TrainingState()


def _empty_array(kind: Any, shape: Any, code: Any) -> Tensor:
    """An array is made empty, and then filled by its state."""
    if shape != (0,):
        refuse('an array that claims a shape before its data')
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
    '__builtin__.bytes': _empty_bytes,  # so named in pickles of protocol 2
    '__builtin__.getattr': _history_method,
    '__builtin__.set': TrainingState,
    'argparse.Namespace': TrainingState,
    'builtins.getattr': _history_method,
    'builtins.set': TrainingState,
    'collections.Counter': TrainingState,
    'collections.OrderedDict': _empty_dict,
    'mmengine.logging.history_buffer.HistoryBuffer': TrainingState,
    'numpy.dtype': Dtype,
    'numpy.ndarray': 'ndarray',  # named in every array, never to be called
    'torch.Size': TrainingState,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch.device': TrainingState,
}


class _Opcodes(dict):
    def __missing__(self, code: int) -> None:
        refuse(f'opcode {bytes([code])!r}')


class ArrayUnpickler(pickle._Unpickler):
    """For Detectron2's pickles: NumPy arrays, read as tensors, in plain containers.

    Args:
        file: Open for reading.
        size: Bytes in the file. What is made from it takes up no more than twice as many.
    """

    dispatch = _Opcodes()
    for _name in OPCODES.split():
        dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _name)[0]]

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file, encoding='latin1')  # what Python 2 wrote
        self.left = 2 * size  # pickles of protocol 2 spell bytes as text; we make bytes of it, and then an array
        self.names = {
            **NAMES,
            '_codecs.encode': self._encode,
            'torch._utils._rebuild_tensor': self._tensor,
            'torch._utils._rebuild_tensor_v2': self._tensor,
        }
        for module in ('numpy.core', 'numpy._core'):
            self.names[f'{module}.multiarray._reconstruct'] = _empty_array
            self.names[f'{module}.multiarray.scalar'] = self._scalar
            self.names[f'{module}.numeric._frombuffer'] = self._array

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; the file's own is never imported."""
        try:
            return self.names[f'{module}.{name}']
        except KeyError:
            refuse(f'to execute {module}.{name}')

    def _claim(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise pickle.UnpicklingError('claims more data than the file has')

    def _encode(self, text: str, encoding: str) -> bytes:
        """How pickles of protocol 2 spell bytes."""
        if encoding != 'latin1':
            refuse('an encoding other than latin1')
        self._claim(len(text))
        return text.encode(encoding)

    def _array(self, data: Any, dtype: Dtype, shape: tuple, order: str = 'C') -> Tensor:
        if isinstance(data, str):  # bytes of Python 2
            data = data.encode('latin1')
        array = np.frombuffer(data, dtype.value).reshape(_tuple(shape), order=order)
        self._claim(array.nbytes)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder('=')))  # a copy that can be written

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
        # Other keys name no weights; hashing a nested tuple can crash Python or take forever.
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
        """REDUCE: calls what stands for a name."""
        args = _tuple(self.stack.pop())
        self.stack[-1] = self.stack[-1](*args)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        """NEWOBJ: of nothing but what stands for training state."""
        self.stack.pop()
        if self.stack.pop() is not TrainingState:
            refuse('a new object of a class that is built in another way')
        self.append(TrainingState())

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        """BUILD: fills arrays and completes their types."""
        owner = self.stack[-2]
        if isinstance(owner, Dtype):
            owner.value = owner.value.newbyteorder(_tuple(self.stack.pop())[1])
        elif isinstance(owner, Tensor):
            _, shape, dtype, is_fortran, data = _tuple(self.stack.pop())
            owner.data = self._array(data, dtype, shape, 'F' if is_fortran else 'C')
        else:  # attributes of anything else are no weights
            self.stack.pop()

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: no more than the file has, where Python makes room first."""
        self.append(bytearray(self.read(*struct.unpack('<Q', self.read(8)))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class TorchUnpickler(ArrayUnpickler):
    """For the pickles in PyTorch's files, whose tensors are views of storages that follow elsewhere.

    Attributes:
        storages: Those that the pickle names, still to be filled.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file, size)
        self.storages: Dict[str, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, to be filled later."""
        if type(pid) is not tuple or pid[0] != 'storage' or pid[5:] not in ((), (None,)) or type(pid[2]) is not str:
            refuse('what is no storage')
        _, dtype, key, _, numel = pid[:5]
        if key not in self.storages:
            self._claim(numel * torch.empty(0, dtype=dtype).element_size())
            self.storages[key] = torch.empty(numel, dtype=dtype)
        return self.storages[key]
