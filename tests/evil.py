"""Hostile checkpoint files: attacks, handwritten pickles, and checks that nothing is executed or overallocated."""

import argparse
import builtins
import codecs
import io
import os
import pickle
import resource
import struct
import sys
import zipfile
from contextlib import contextmanager
from functools import lru_cache, partial

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmvitzoo.checkpoints import CheckpointError, load
from mmvitzoo.checkpoints.safe_pickle import ArrayUnpickler

HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'


class Evil:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def attacks(target):
    """Returns, by name, objects that would create the file ``target`` or reach a function that could."""
    touch = f'open({str(target)!r}, "w").close()'
    return {
        'os.system': Evil(os.system, f'touch {target}'),
        'exec': Evil(builtins.exec, touch),
        'eval': Evil(builtins.eval, touch),
        'open': Evil(open, str(target), 'w'),
        'getattr': Evil(getattr, HistoryBuffer, '__init__'),
        'getattr chain': Evil(getattr, Evil(getattr, HistoryBuffer, 'mean'), '__globals__'),
        'torch loader': Evil(torch.storage._load_from_bytes, b'x'),
        'numpy loader': Evil(np.load, str(target)),
    }


# ---------------------------------------------------------------- checks

events, listening = [], []


def _listen(event, args):
    if not listening or event in ('os.listdir', 'os.scandir'):
        return
    if event == 'open':
        mode = args[1] or ''
        if not set('wax+') & set(mode) and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
    if event.startswith(('open', 'import', 'exec', 'compile', 'os.', 'subprocess.', 'socket.', 'ctypes.', 'pickle.')):
        events.append((event, args))


@lru_cache(maxsize=None)
def _start_to_listen():
    """Adds an audit hook, which cannot be removed and is active within `nothing_executed` only."""
    codecs.lookup('cp437')  # the first zip archive imports it
    sys.addaudithook(_listen)


def globals_now():
    """Returns the attributes that a pickle could reach by name and change."""
    unpickler = ArrayUnpickler(io.BytesIO(), 0)
    reachable = (argparse.Namespace, HistoryBuffer, Tensor, torch._utils, np.dtype, *unpickler.names.values())
    return [dict(vars(x)) for x in reachable if hasattr(x, '__dict__')], dict(unpickler.dispatch)


@contextmanager
def nothing_executed():
    """Checks that reading opens no file for writing, imports and executes nothing, and changes no global."""
    _start_to_listen()
    before = globals_now()
    events.clear()
    listening.append(True)
    try:
        yield
    finally:
        listening.clear()
    assert not events and globals_now() == before


@contextmanager
def little_memory(mebibytes=200):
    """Checks the growth of the peak memory, which an earlier and higher peak would hide."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes * 1024


def outcome(path):
    """Returns the weights in a file, or None after an error of one clear line that names the file."""
    with nothing_executed():
        try:
            loaded = load(path)
        except CheckpointError as error:
            assert str(error).startswith(f'{path}: ') and str(error).isprintable() and len(str(error)) <= 1000
            return None
    assert loaded and all(type(key) is str and type(value) is Tensor for key, value in loaded.items())
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in loaded.values()}
    assert sum(storages.values()) <= 2 * os.path.getsize(path)
    assert all(x.numel() * x.element_size() <= x.untyped_storage().nbytes() for x in loaded.values())
    return loaded


def same(loaded, expected):
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value)


# ---------------------------------------------------------------- handwritten files


class Op:
    """An opcode of a pickle, after the parts that it takes from the stack."""

    def __init__(self, code, *parts):
        self.code, self.parts = code, parts


MARK = Op(b'(')
GET = Op(b'h\x03')  # reads the value that the opcode b'q\x03' has stored


def name(full):
    return Op('c{}\n{}\n'.format(*full.rsplit('.', 1)).encode('utf-8', 'surrogatepass'))


def call(function, *args):
    return Op(b'R', name(function) if isinstance(function, str) else function, args)


def build(owner, state):
    return Op(b'b', owner, state)


def update(owner, *items):
    return Op(b'u', owner, MARK, *items)


def encode(x):
    """Returns the opcodes that build a value."""
    if isinstance(x, Op):
        return b''.join(map(encode, x.parts)) + x.code
    if isinstance(x, dict):
        return encode(update(Op(b'}'), *(part for item in x.items() for part in item)))
    if isinstance(x, list):
        return encode(Op(b'e', Op(b']'), MARK, *x))
    if isinstance(x, tuple):
        return encode(Op(b't', MARK, *x))
    if isinstance(x, str):
        data = x.encode('utf-8', 'surrogatepass')
        return b'X' + struct.pack('<I', len(data)) + data
    if isinstance(x, bytes):
        return b'B' + struct.pack('<I', len(x)) + x
    if x is None or isinstance(x, bool):
        return {None: b'N', True: b'\x88', False: b'\x89'}[x]
    if isinstance(x, int):
        data = pickle.encode_long(x)
        return b'\x8a' + bytes([len(data)]) + data
    return b'G' + struct.pack('>d', x)


def program(x):
    return b'\x80\x02' + encode(x) + b'.'


def stored(form, numel=4, key='0', size=(4,), stride=(1,), offset=0):
    """Builds a tensor in a PyTorch file."""
    pid = ('storage', name('torch.FloatStorage'), key, 'cpu', numel, *([None] if form == 'legacy' else []))
    hooks = call('collections.OrderedDict')
    return call('torch._utils._rebuild_tensor_v2', Op(b'Q', pid), offset, size, stride, False, hooks)


def dtype(code='f4'):
    return build(call('numpy.dtype', code, False, True), (3, '<', None, None, None, -1, -1, 0))


def array(data=bytes(16), shape=(4,), code='f4'):
    """Builds a NumPy array."""
    empty = call('numpy.core.multiarray._reconstruct', name('numpy.ndarray'), (0,), b'b')
    return build(empty, (1, shape, dtype(code), False, data))


def legacy_header():
    file = io.BytesIO()
    torch.save({}, file, _use_new_zipfile_serialization=False)
    whole = file.getvalue()
    file.seek(0)
    for _ in ('magic number', 'version', 'system'):
        pickle.load(file)
    return whole[: file.tell()]


LEGACY_HEADER = legacy_header()
FILES = ('pickle', 'zip', 'legacy')


def write(path, form, content):
    """Writes a file with a pickle and, in PyTorch's formats, the data of one tensor."""
    if form == 'pickle':
        path.write_bytes(content)
    elif form == 'legacy':
        path.write_bytes(LEGACY_HEADER + content + program(['0']) + struct.pack('<q', 4) + bytes(16))
    else:
        with zipfile.ZipFile(path, 'w') as archive:
            for member, data in {
                'data.pkl': content,
                'version': '3',
                'byteorder': 'little',
                'data/0': bytes(16),
            }.items():
                archive.writestr(f'a/{member}', data)


# Names without a stand-in.
FORBIDDEN = [
    *('os.system', 'posix.system', 'nt.system', 'subprocess.Popen', 'subprocess.getoutput', 'runpy.run_path'),
    *(f'{x}.{y}' for x in ('builtins', '__builtin__') for y in ('eval', 'exec', 'open', '__import__', 'type', 'vars')),
    *('builtins.object', 'builtins.dict', 'builtins.list', 'builtins.bytearray', 'collections.defaultdict'),
    *('functools.partial', 'functools.reduce', 'itertools.product', 'operator.attrgetter', 'operator.methodcaller'),
    *('torch.load', 'torch.jit.load', 'torch.hub.load', 'torch.storage._load_from_bytes', 'torch.ones', 'torch.Tensor'),
    *('torch.save', 'torch._utils._rebuild_qtensor', 'torch._utils._rebuild_sparse_tensor', 'torch._tensor.Tensor'),
    *('torch.nn.parameter.Parameter', 'torch._utils._rebuild_wrapper_subclass', 'torch.serialization.load'),
    *('importlib.import_module', 'pickle.loads', 'marshal.loads', 'types.FunctionType', 'types.CodeType'),
    *('ctypes.CDLL', 'copyreg._reconstructor', 'copy_reg._reconstructor', 'copyreg.__newobj__', 'pathlib.Path'),
    *('numpy.load', 'numpy.save', 'numpy.fromfile', 'numpy.memmap', 'numpy.ones', 'numpy.core.multiarray.empty'),
    *('numpy._core.multiarray.fromfile', 'numpy.core.records.fromfile', 'numpy.testing._private.utils.runstring'),
    *(f'{HISTORY}.__init__', f'{HISTORY}.__init__.__globals__', 'mmengine.logging.history_buffer.np.load'),
    *('argparse.Namespace.__init__', 'collections.OrderedDict.fromkeys', 'numpy.dtype.__setstate__', 'argparse._sys'),
    *('sys.modules', 'sys.setrecursionlimit', 'mmvitzoo.checkpoints.save', 'mmvitzoo.checkpoints.safe_pickle.refuse'),
]


# ---------------------------------------------------------------- claims of more data than the file has


def doubled(times):
    """Builds a tuple of 2 ** times leaves from a few bytes."""
    return Op(b')' + b'q\x00h\x00\x86' * times)


def deep(n):
    return Op(b')' + b'\x85' * (n % 10**5))


def length(code, size, n):
    return Op(code + (n % 256**size).to_bytes(size, 'little') + b'abc')


def many(part):
    return Op(b'e', Op(b']'), MARK, *[part] * 2000)


LENGTHS = {b'\x8d': 8, b'\x8e': 8, b'\x96': 8, b'\x95': 8, b'\x8b': 4, b'X': 4, b'B': 4, b'T': 4, b'r': 4, b'j': 4}
MULTIARRAY = 'numpy.core.multiarray'
CLAIMS = {
    **{f'length of {code!r}': partial(length, code, size) for code, size in LENGTHS.items()},
    'index in the memo': lambda n: Op(f']p{n}\n'.encode()),
    'number': lambda n: Op(b'L' + b'9' * (n % 10**6) + b'L\n'),
    'shape before data': lambda n: call(f'{MULTIARRAY}._reconstruct', name('numpy.ndarray'), (n,), b'b'),
    'array': lambda n: call('numpy.ndarray', (n,)),
    'shape': lambda n: array(shape=(n,)),
    'shape that overflows': lambda n: array(shape=(2**32, 2**32, n)),
    'empty shape': lambda n: array(b'', (0, n, n)),
    'negative shape': lambda n: array(shape=(-n, -4)),
    'dtype': lambda n: array(code=f'V{n}'),
    'scalar': lambda n: call(f'{MULTIARRAY}.scalar', call('numpy.dtype', f'V{n}')),
    'array in place': lambda n: call('numpy._core.numeric._frombuffer', bytes(16), dtype(), (n,), 'C'),
    'numel': lambda n: stored('zip', n, size=(n,)),
    'numel of legacy files': lambda n: stored('legacy', n, size=(n,)),
    'size': lambda n: stored('zip', size=(n,)),
    'size by a stride of zero': lambda n: stored('zip', size=(n,), stride=(0,)),
    'sizes that overflow': lambda n: stored('zip', size=(n, n), stride=(1, n)),
    'offset': lambda n: stored('zip', offset=n),
    'stride': lambda n: stored('zip', stride=(n,)),
    'history': lambda n: call(HISTORY, [0], [1], n),
    'history that doubles': lambda n: call(HISTORY, doubled(40), doubled(40)),
    'deep value': deep,
    'deep list': lambda n: Op(b']' * (n % 10**5 + 1) + b'a' * (n % 10**5)),
    'deep dict': lambda n: Op(b'}' + (encode('model') + b'}') * (n % 10**4) + b's' * (n % 10**4)),
    'deep key': lambda n: update(Op(b'}'), deep(n), 0),
    'deep shape': lambda n: array(shape=deep(n)),
    'marks': lambda n: Op(b'(' * (n % 10**5)),
    'doubled value': lambda n: doubled(50),
    'doubled key': lambda n: update(Op(b'}'), doubled(50), 0),
    'doubled shape': lambda n: array(shape=doubled(50)),
    'doubled values of a shape': lambda n: array(shape={'x': doubled(50)}),
    'doubled dtype': lambda n: call('numpy.dtype', doubled(50)),
    'doubled getattr': lambda n: call('builtins.getattr', name(HISTORY), doubled(50)),
    'doubled encoding': lambda n: call('_codecs.encode', 'a', doubled(50)),
    'doubled numel': lambda n: stored('zip', doubled(50)),
    'arrays of the same bytes': lambda n: [Op(b'q\x03', bytes(10**6)), many(array(GET, (10**6,), 'i1'))],
    'bytes of the same text': lambda n: [Op(b'q\x03', 'a' * 10**6), many(call('_codecs.encode', GET, 'latin1'))],
    'additions of tensors': lambda n: [
        Op(b'q\x03', array(bytes(10**5), (10**5, 1), 'i1')),
        Op(b'\x90', GET, MARK, array(bytes(10**5), (1, 10**5), 'i1')),
    ],
    'iteration of tensors': lambda n: Op(b'R', name('torch.Size'), array(bytes(10**6), (10**6,), 'i1')),
}
