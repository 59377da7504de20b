"""Files and state dicts as no one wrote them: a right result or one clear error, and nothing executed."""

import argparse
import codecs
import collections
import io
import json
import os
import pickle
import re
import resource
import struct
import sys
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from evil import attacks
from forms import FORMS, slim
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer
from safetensors.torch import save
from torch import Tensor

from mmvitzoo.checkpoints import CheckpointError, convert, export, load, reading
from mmvitzoo.checkpoints.conversion import LAYOUTS
from mmvitzoo.checkpoints.layout import Refuse
from mmvitzoo.checkpoints.unpickling import ArrayUnpickler

seeds = st.integers(0, 2**64)  # for choices that are evenly distributed
fuzz = partial(settings, deadline=None, database=None, suppress_health_check=list(HealthCheck))
WEIGHTS = {'stem.weight': torch.arange(12.0).view(3, 4), 'stem.bias': torch.ones(3, dtype=torch.float16)}

# ---------------------------------------------------------------- what must never happen

heard, listening = [], []


def _listen(event, args):
    if not listening or event in ('os.listdir', 'os.scandir'):
        return
    if event == 'open':
        mode = args[1] or ''
        if not set('wax+') & set(mode) and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
    if event.startswith(('open', 'import', 'exec', 'compile', 'os.', 'subprocess.', 'socket.', 'ctypes.', 'pickle.')):
        heard.append((event, args))


codecs.lookup('cp437')  # of zip archives; imported by their first
sys.addaudithook(_listen)  # for good, but deaf outside of `nothing_executed`


def globals_now():
    """What a pickle could reach by name, and change."""
    unpickler = ArrayUnpickler(io.BytesIO(), 0)
    reachable = (argparse.Namespace, HistoryBuffer, Tensor, torch._utils, np.dtype, *unpickler.names.values())
    return [dict(vars(x)) for x in reachable if hasattr(x, '__dict__')], dict(unpickler.dispatch)


@contextmanager
def nothing_executed():
    before = globals_now()
    heard.clear()
    listening.append(True)
    try:
        yield
    finally:
        listening.clear()
    assert not heard and globals_now() == before


@contextmanager
def little_memory(mebibytes=200):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes * 1024


def outcome(path):
    """The weights in a file, or nothing after one clear line that names the file."""
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


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'weights.pth'


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """What is logged would be longer than all else, and the first line of a log imports modules."""
    monkeypatch.setattr(reading, 'print_log', lambda line, logger: None)


# ---------------------------------------------------------------- writing files by hand


class Op:
    """An opcode of a pickle after what it takes from the stack."""

    def __init__(self, code, *parts):
        self.code, self.parts = code, parts


MARK = Op(b'(')
GET = Op(b'h\x03')  # what was put there by the opcode b'q\x03'


def name(full):
    return Op('c{}\n{}\n'.format(*full.rsplit('.', 1)).encode('utf-8', 'surrogatepass'))


def call(function, *args):
    return Op(b'R', name(function) if isinstance(function, str) else function, args)


def build(owner, state):
    return Op(b'b', owner, state)


def update(owner, *items):
    return Op(b'u', owner, MARK, *items)


def spell(x):
    """The opcodes that build something."""
    if isinstance(x, Op):
        return b''.join(map(spell, x.parts)) + x.code
    if isinstance(x, dict):
        return spell(update(Op(b'}'), *(part for item in x.items() for part in item)))
    if isinstance(x, list):
        return spell(Op(b'e', Op(b']'), MARK, *x))
    if isinstance(x, tuple):
        return spell(Op(b't', MARK, *x))
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
    return b'\x80\x02' + spell(x) + b'.'


def stored(form, numel=4, key='0', size=(4,), stride=(1,), offset=0):
    """A tensor in a PyTorch file."""
    pid = ('storage', name('torch.FloatStorage'), key, 'cpu', numel, *([None] if form == 'legacy' else []))
    hooks = call('collections.OrderedDict')
    return call('torch._utils._rebuild_tensor_v2', Op(b'Q', pid), offset, size, stride, False, hooks)


def dtype(code='f4'):
    return build(call('numpy.dtype', code, False, True), (3, '<', None, None, None, -1, -1, 0))


def array(data=bytes(16), shape=(4,), code='f4'):
    """A NumPy array."""
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
    """A file with such a pickle in it and, where that is outside of the pickle, the data of one tensor."""
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


def test_files_written_by_hand_are_right(path):
    """Without what fuzzing adds, the files of this module load."""
    for form in FILES:
        tensor = array() if form == 'pickle' else stored(form)
        write(path, form, program({'model': {'w': tensor}}))
        same(outcome(path), {'w': torch.zeros(4)})


# ---------------------------------------------------------------- damaged files


def valid_files():
    arrays = {key: value.numpy() for key, value in WEIGHTS.items()}
    files = {f'pickle {i}': pickle.dumps(dict(model=arrays, author='x'), protocol=i) for i in (2, 3, 4, 5)}
    for form in ('zip', 'legacy'):
        file = io.BytesIO()
        torch.save({'state_dict': WEIGHTS, 'epoch': 3}, file, _use_new_zipfile_serialization=form == 'zip')
        files[form] = file.getvalue()
    return {**files, 'safetensors': save(WEIGHTS)}


VALID = valid_files()


@fuzz(max_examples=3500)
@given(seed=seeds)
def test_damaged_files(path, seed):
    """Cut off, overwritten, longer or shorter."""
    random = Random(seed)
    form = random.choice(sorted(VALID))
    content = VALID[form]
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        at = random.randrange(len(content) + 1)
        data = bytes(random.choices([0, 1, 255, random.randrange(256)], k=random.randint(1, 4)))
        content = random.choice(
            [
                content[:at] + data + content[at + len(data) :],
                content[:at] + data + content[at:],
                content[:at] + content[at + len(data) :],
                content[:at],
            ]
        )
    path.write_bytes(content)
    loaded = outcome(path)
    assert loaded is not None or content != VALID[form]
    if loaded is not None and (form == 'zip' or content == VALID[form]):  # members of an archive have checksums
        same(loaded, WEIGHTS)


# ---------------------------------------------------------------- pickles that ask for more than weights

HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
ALLOWED = sorted(ArrayUnpickler(io.BytesIO(), 0).names)
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
    *('sys.modules', 'sys.setrecursionlimit', 'mmvitzoo.checkpoints.save', 'mmvitzoo.checkpoints.unpickling.refuse'),
]
TARGET = Path(tempfile.gettempdir()) / f'executed-{os.getpid()}'
TEXTS = [
    f'touch {TARGET}',
    f'open({str(TARGET)!r}, "w")',
    str(TARGET),
    'w',
    'os',
    'latin1',
    'storage',
    '0',
    'cpu',
    'f4',
]
TEXTS += ['min', 'mean', '__init__', '__globals__', '__setstate__', '__class__', '<', 'V99', 'O', 'model', 'é\n\ud800']
numbers = st.integers(-3, 300) | st.sampled_from([2**31, 2**63 - 1, 2**63, 10**12, -(10**12), 10**40])
leaves = st.one_of(
    st.sampled_from([None, True, False, 0.5, float('nan'), b'', bytes(16), (), (0,), (4,), (1, (4,), False)]),
    numbers,
    st.sampled_from(TEXTS),
    st.sampled_from(ALLOWED).map(name),
    st.sampled_from(
        [array(), dtype(), stored('zip'), stored('legacy'), stored('zip', 2, '1'), Op(b'}'), Op(b']'), Op(b'h\x00')]
    ),
)


def deeper(trees):
    lists = st.lists(trees, max_size=4)
    return st.one_of(
        lists,
        lists.map(tuple),
        lists.map(lambda x: update(Op(b'}'), *x, *x[len(x) - len(x) % 2 :], *['k'] * (len(x) % 2))),
        st.builds(Op, st.sampled_from([b'R', b'b', b'\x81', b'a']), trees, trees),
        st.builds(lambda f, x: call(f, *x), st.sampled_from(ALLOWED), lists),
        st.builds(lambda f, x: Op(b'R', f, tuple(x)), trees, lists),
        st.builds(lambda owner, x: build(owner, {'__setstate__': x, 'mean': x}), trees, trees),
        st.builds(lambda owner, x: build(owner, (None, {'__init__': x, '__code__': x})), trees, trees),
        st.builds(update, trees, trees, trees),
        st.builds(Op, st.sampled_from([b'Q', b'\x85', b'q\x00', b'q\x01', b'2', b'\x94']), trees),
        st.builds(lambda owner, x: Op(b'e', owner, MARK, *x), trees, lists),
        st.builds(lambda owner, x: Op(b'\x90', owner, MARK, *x), trees, lists),
        st.builds(lambda *args: Op(b'Q', ('storage', name('torch.FloatStorage'), *args)), trees, trees, trees),
        st.builds(lambda *args: call('torch._utils._rebuild_tensor_v2', stored('zip'), *args), trees, trees, trees),
        st.builds(array, trees, trees),
        st.builds(array, shape=trees, code=trees),
        st.builds(build, st.sampled_from([array(), dtype(), stored('zip')]), trees),
    )


trees = st.recursive(leaves, deeper, max_leaves=12)
PLACES = [
    lambda x: x,
    lambda x: {'model': {'w': x}},
    lambda x: {'model': {'v': array(), 'w': x}, 'epoch': 3},
    lambda x: {'model': {'v': array()}, 'args': [x]},
    lambda x: {'w': build(array(), x)},
    lambda x: {'w': array(), 'x': update(Op(b'}'), x, 'value of a strange key')},
    lambda x: {'v': stored('zip'), 'w': call('torch._utils._rebuild_parameter', x, True, {})},
    lambda x: build({'w': array()}, x),
]


@fuzz(max_examples=2000)
@given(form=st.sampled_from(FILES), place=st.sampled_from(PLACES), tree=trees)
def test_pickles_of_allowed_names(path, form, place, tree):
    """Whatever is made of the names that mean something: neither executed nor changed."""
    with little_memory():
        write(path, form, program(place(tree)))
        outcome(path)


@fuzz(max_examples=1300)
@given(
    form=st.sampled_from(FILES),
    place=st.sampled_from(PLACES),
    bomb=st.sampled_from(FORBIDDEN) | st.text(min_size=1, max_size=9).map('x.{}'.format),
    attribute=st.sampled_from(['', '.__init__', '.__globals__', '.system']),
    args=st.lists(st.sampled_from(TEXTS) | trees, max_size=3),
    depth=st.integers(0, 20),
    kind=st.sampled_from(['call', 'chain', 'attribute', 'new', 'state', 'object']),
)
def test_bombs(path, form, place, bomb, attribute, args, depth, kind):
    """A name that means nothing to us ends the reading, wherever it stands."""
    bomb = name((bomb + attribute).replace('\n', ''))
    if kind == 'chain':
        bomb = call('builtins.getattr', bomb, '__globals__')
    elif kind == 'attribute':
        bomb = call('builtins.getattr', name(HISTORY), attribute[1:])
    elif kind == 'new':
        bomb = Op(b'\x81', bomb, tuple(args))
    elif kind == 'state':
        bomb = build(call(HISTORY), {'mean': bomb})
    elif kind == 'call':
        bomb = call(bomb, *args)
    for i in range(depth):
        bomb = [bomb] if i % 3 else {'state_dict': bomb}
    with little_memory():
        write(path, form, program(place(bomb)))
        assert outcome(path) is None and not TARGET.exists()


@fuzz(max_examples=300)
@given(
    form=st.sampled_from(FILES),
    attack=st.sampled_from(sorted(attacks('x'))),
    keys=st.lists(st.sampled_from([*reading.WRAPPERS, 'a', 0, None]), max_size=8),
    protocol=st.integers(2, 5),
)
def test_bombs_of_the_real_pickler(path, form, attack, keys, protocol):
    content = attacks(TARGET)[attack]
    for key in keys:
        content = {'w': torch.zeros(1), key: content} if key is not None else [content]
    file = io.BytesIO()
    if form == 'pickle':
        pickle.dump(content, file, protocol=protocol)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == 'zip')
    path.write_bytes(file.getvalue())
    assert outcome(path) is None and not TARGET.exists()


OPCODES = [
    value for key, value in vars(pickle).items() if re.fullmatch('[A-Z][A-Z0-9_]+', key) and type(value) is bytes
]


@fuzz(max_examples=1000)
@given(
    form=st.sampled_from(FILES),
    soup=st.lists(st.sampled_from(OPCODES) | st.binary(max_size=3) | leaves.map(spell), max_size=30).map(b''.join),
)
def test_opcodes_at_random(path, form, soup):
    with little_memory():
        write(path, form, b'\x80\x04' + soup)
        outcome(path)


# ---------------------------------------------------------------- files that claim more than they have


def doubled(times):
    """A tuple of 2 ** times leaves, in a few bytes."""
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
    'place in the memo': lambda n: Op(f']p{n}\n'.encode()),
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
    'deep dict': lambda n: Op(b'}' + (spell('model') + b'}') * (n % 10**4) + b's' * (n % 10**4)),
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
huge = st.sampled_from([2**31 - 1, 2**32 - 1, 2**33, 10**12, 2**62, 2**63 - 1, 2**64 - 1]) | st.integers(2**31, 2**66)


@fuzz(max_examples=600)
@given(form=st.sampled_from(FILES), place=st.sampled_from(PLACES), claim=st.sampled_from([*CLAIMS.values()]), n=huge)
def test_claims(path, form, place, claim, n):
    with little_memory():
        write(path, form, program(place(claim(n))))
        outcome(path)


@fuzz(max_examples=600)
@given(
    wrong=st.just({})
    | st.dictionaries(st.sampled_from(['shape', 'data_offsets']), st.lists(huge | numbers, max_size=3)),
    dtype=st.sampled_from(['F32'] * 9 + ['I32', 'F16', 'BF16', 'I64', 'BOOL', 'U8', 'F8_E4M3', 'F4', 'C64', '']),
    size=st.sampled_from([None] * 9 + [0, 1, 60, 300, 2**31, 2**40, 2**62, 2**64 - 1]),
    depth=st.sampled_from([0] * 9 + [10, 10**4]),
    data=st.just(bytes(16)) | st.binary(max_size=40),
)
def test_claims_of_safetensors(path, wrong, dtype, size, depth, data):
    header = {'v': dict(dtype='U8', shape=[0], data_offsets=[0, 0])}
    header['w'] = {**dict(dtype=dtype, shape=[2, 2], data_offsets=[0, 16]), **wrong}
    text = json.dumps(header).encode()
    text = text[:-1] + b', "x": ' + b'[' * depth + b']' * depth + b'}' if depth else text
    path.write_bytes((len(text) if size is None else size % 2**64).to_bytes(8, 'little') + text + data)
    with little_memory():
        outcome(path)


@pytest.mark.parametrize('member', ['data.pkl', 'byteorder', 'data/0'])
def test_compressed_archives(path, member):
    """A few bytes become 400 MiB."""
    n = 100 * 2**20
    content = {'version': b'3\n', 'data.pkl': program({'w': stored('zip', n, size=(n,))}), member: bytes(4 * n)}
    with zipfile.ZipFile(path, 'w') as archive:
        for key, data in content.items():
            archive.writestr(f'a/{key}', data, zipfile.ZIP_DEFLATED if key == member else None, 1)
    with little_memory():
        assert outcome(path) is None


MEMBERS = [
    '../x',
    '../../x',
    '/tmp/x',
    'a/../../x',
    'a/data/../../../x',
    'a/data/../0',
    'a\\..\\x',
    'C:\\x',
    'a/',
    'a',
    '',
]
MEMBERS += ['a/data.pkl', 'a/data/0', 'a/data/1', 'A/DATA/0', 'b/data.pkl', 'a/constants.pkl', 'a/byteorder', '\0']


@fuzz(max_examples=800)
@given(
    members=st.lists(
        st.tuples(
            st.sampled_from(MEMBERS) | st.text(max_size=5),
            st.sampled_from(
                [b'', bytes(16), b'little', b'big', program({'w': stored('zip')}), program({'w': array()})]
            ),
            st.sampled_from([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
        ),
        max_size=4,
    ),
    key=st.sampled_from(['0', '0', '0', '1', '../0', '../../x', '/etc/passwd', '../data.pkl', '', '\0']),
    first=st.booleans(),
    claims=st.lists(st.tuples(st.sampled_from([8, 10, 20, 24, 28, 30, 42]), st.integers(0, 5), huge), max_size=2),
)
def test_members_of_archives(tmp_path, members, key, first, claims):
    """Whatever they are called and claim to be: nothing is written, and what is read are the right bytes."""
    usual = {'a/version': b'3\n', 'a/data.pkl': program({'w': stored('zip', key=key)}), 'a/data/0': bytes(16)}
    usual = [(*member, zipfile.ZIP_STORED) for member in usual.items()]
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of names that are there twice
        for member, data, method in usual + members if first else members + usual:
            archive.writestr(zipfile.ZipInfo(member), data, method)
    content = bytearray(file.getvalue())
    entries = [x.start() for x in re.finditer(b'PK\1\2', content)]
    for field, entry, n in claims:
        at = entries[entry % len(entries)] + field
        content[at : at + 4] = (n % 2**32).to_bytes(4, 'little')
    path = tmp_path / 'some' / 'folder' / 'weights.pth'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    before = sorted(tmp_path.rglob('*'))
    with little_memory():
        loaded = outcome(path)
    assert sorted(tmp_path.rglob('*')) == before
    if loaded is not None:
        same(loaded, {'w': torch.zeros(4)})


# ---------------------------------------------------------------- contents of every kind


def endless():
    content = {}
    content['model'] = content
    return content


TENSORS = [
    *(torch.arange(6.0).view(2, 3).to(x) for x in (torch.float64, torch.float16, torch.int64, torch.int8, torch.uint8)),
    *(torch.ones(2).to(x) for x in (torch.bfloat16, torch.bool, torch.complex64, torch.complex128, torch.int16)),
    *(torch.tensor(3), torch.zeros(0, 4), torch.arange(6.0).view(2, 3).t(), torch.arange(9.0)[2:8:3]),
    torch.nn.Parameter(torch.ones(2)),
]
STRANGE = [
    torch.eye(2).to_sparse(),
    torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    torch.ones(2, device='meta'),
    torch.ones(2).expand(5, 2),
    torch.ones(2, dtype=torch.complex64).conj(),
]
OTHERS = [None, 3, 2.5, 'text', [1, torch.ones(1)], (1, 2), {'lr': 0.1}, argparse.Namespace(lr=0.1), torch.Size([2])]
OTHERS += [collections.Counter([1, 1]), torch.float16, {1, 2}, np.float32(2), np.arange(3)]
keys = st.sampled_from(
    ['a', 'b.weight', 'module.a', 'module.b', 'module.', 'é', '', 'model', 0, None, 2.5, True, b'a', (1, 2)]
)
values = st.sampled_from(range(len(TENSORS))).map(TENSORS.__getitem__)
flat = st.dictionaries(keys, st.one_of(values, values, values, st.sampled_from(OTHERS)), max_size=5)
wrapped = st.recursive(
    flat,
    lambda inner: st.builds(
        lambda *parts: {k: v for part in parts for k, v in part.items()},
        flat,
        st.dictionaries(st.sampled_from(reading.WRAPPERS), inner, min_size=1, max_size=2),
    ),
    max_leaves=8,
)


def expected(content):
    """What the weights in there are."""
    for _ in range(6):
        inside = [content[key] for key in reading.WRAPPERS if type(content.get(key)) is dict]
        if not inside:
            break
        content = inside[0]
    else:
        return {}
    arrays = {key: torch.tensor(x) for key, x in content.items() if isinstance(x, (np.ndarray, np.generic))}
    content = {**content, **arrays}
    weights = {key: x.detach() for key, x in content.items() if type(key) is str and isinstance(x, Tensor)}
    if all(key.startswith('module.') for key in weights):
        weights = {key[7:]: x for key, x in weights.items()}
    return weights


@fuzz(max_examples=1000)
@given(
    form=st.sampled_from(['zip', 'legacy']),
    content=wrapped | st.sampled_from([*OTHERS, *TENSORS, endless()]),
    strange=st.sampled_from([None] * 9 + STRANGE),
)
def test_contents(path, form, content, strange):
    """Wrapped and mixed up as can be: exactly the weights, or an error if there are none or unreadable ones."""
    if strange is not None:
        content = {'x': strange, 'y': content}
    torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    loaded = outcome(path)
    if strange is None and isinstance(content, dict) and expected(content):
        same(loaded, expected(content))
    else:
        assert loaded is None


@fuzz(max_examples=600)
@given(protocol=st.integers(2, 5), content=wrapped, order=st.sampled_from('CF'))
def test_contents_in_numpy(path, protocol, content, order):
    def in_numpy(x):
        if isinstance(x, dict):
            return {key: in_numpy(value) for key, value in x.items()}
        if isinstance(x, Tensor) and x.dtype != torch.bfloat16:
            return np.asarray(x.detach().numpy(), order=order)
        return 'text' if isinstance(x, (Tensor, list, set, torch.dtype)) else x

    content = in_numpy(content)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = outcome(path)
    if expected(content):
        same(loaded, expected(content))
    else:
        assert loaded is None


# ---------------------------------------------------------------- state dicts to convert

GOLDEN = [
    *('mpvit_tiny_official', 'mvitv2_tiny_official', 'mvitv2_tiny_d2', 'scalablevit_small_official'),
    *('vitae-s_vitae-repo', 'vitae_vitae-repo_small'),
    *('vitdet_d2_small', 'vitdet_d2_conv-propagation', 'vitdet_vitae-repo_small'),
]


def in_layout(layout, backbone):
    """A backbone of ours in the names of a layout, and all that its table knows besides."""
    weights = {f'backbone.{key}': x for key, x in backbone.items()}
    weights = layout.restore(weights) if layout.restore else weights
    theirs = {}
    for key, x in weights.items():
        for pattern, template in layout.inverse_rules():
            match = pattern.fullmatch(key)
            if match:
                theirs[template.format(**match.groupdict())] = x
                break
    for template, target in layout.table.items():
        if not isinstance(target, Refuse) and not str(target).startswith(('backbone.', '{rest}')):
            key = re.sub(r'\{\w+\}', '0', template.replace('{leaf}', 'weight'))
            theirs.setdefault(key, torch.zeros(9))
    return theirs


@pytest.fixture(scope='module')
def samples(load_golden):
    """State dicts of every layout: of the original implementations, and of slim models in the names of its table."""
    samples = [load_golden(name).state_dict for name in GOLDEN]
    prefixes = ('backbone.', 'backbone.bottom_up.backbone.')
    official = {key: x for key, x in samples[0].items() if not key.startswith('cls_head')}
    samples += [{prefix + key: x for key, x in official.items()} for prefix in prefixes]
    for form in FORMS:
        backbone = slim(form).state_dict()
        family = convert(backbone).family
        samples += [in_layout(layout, backbone) for layout in LAYOUTS if layout.family == family]
    known = {(x.family, x.source, x.signature) for x in LAYOUTS}
    found = []
    for sample in samples:
        layout = next((x for x in LAYOUTS if sample.keys() >= set(x.signature)), None)
        if layout and well_converted(sample):
            found.append(sample)
            known.discard((layout.family, layout.source, layout.signature))
    assert not known, known
    return [lambda x=x: {key: value.detach() for key, value in x.items()} for x in found]


# What layouts change besides names: from these keys of theirs come these of ours.
CHANGED = re.compile(r'.*(pos_embed|position_embeddings|rel_pos_[hw]|[qv]_bias|cls_score\.\w+|bbox_pred\.\w+)')
MADE = re.compile(
    r'backbone\.(stem\.(pos_embed|projection\.bias)|.*rel_pos_[hw]|.*attn\.qkv\.bias)|bbox_head\.retina_(cls|reg)\.\w+'
)


def well_converted(state_dict, **wanted):
    """What convert makes, with every weight accounted for; nothing after one clear error."""
    given = dict(state_dict)
    try:
        converted = convert(state_dict, **wanted)
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) <= 1000
        return None
    assert state_dict.keys() == given.keys() and all(state_dict[key] is x for key, x in given.items())
    assert all(isinstance(x, Tensor) for x in converted.state_dict.values())
    ours = {key: id(x) for key, x in converted.state_dict.items()}
    kept = {id(x): key for key, x in given.items() if key not in converted.dropped}
    made = {key for key, x in ours.items() if x not in kept}
    assert all(MADE.fullmatch(key) for key in made)
    assert len(ours) - len(made) == len(kept.keys() & ours.values())  # no weight under two names
    assert all(CHANGED.fullmatch(key) for x, key in kept.items() if x not in ours.values())  # and none lost
    return converted


def other_shape(x, i):
    return [
        lambda: x.transpose(0, -1) if x.dim() else x,
        lambda: x[None],
        lambda: x[..., None],
        lambda: x.flatten()[:0],
        lambda: x.flatten()[0],
        lambda: x.reshape(-1, 1),
        lambda: torch.cat([x, x]) if x.dim() else x,
        lambda: x[:1] if x.dim() else x,
        lambda: x[..., :1] if x.dim() else x,
        lambda: x.new_zeros(0, 10**12),
        lambda: x.new_zeros(1, 10**12, 0),
        lambda: x.new_zeros(1, 1, 1, 1, 1),
    ][i % 12]()


def mutate(weights, kind, key, other, text, i):
    """Changes something about the weight ``key``, or all."""
    if kind == 'remove':
        del weights[key]
    elif kind == 'remove those alike':
        for x in [x for x in weights if x.rsplit('.', 2)[-2:] == key.rsplit('.', 2)[-2:]]:
            del weights[x]
    elif kind == 'remove a part':
        for x in [x for x in weights if x.startswith(key.rsplit('.', i % 3 + 1)[0])]:
            del weights[x]
    elif kind == 'shape':
        weights[key] = other_shape(weights[key], i)
    elif kind == 'dtype':
        dtypes = (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16)
        weights[key] = weights[key].to(dtypes[i % 6])
    elif kind == 'value':
        weights[key] = weights[key] + (1, float('nan'))[i % 2]
    elif kind == 'swap':
        weights[key], weights[other] = weights[other], weights[key]
    elif kind == 'number':
        weights[re.sub('[0-9]+', text, key, count=i % 2)] = weights.pop(key)
    elif kind == 'name':
        weights[[f'{text}{key}', f'{key}{text}', text, key.replace('.', f'.{text}.')][i % 4]] = weights.pop(key)
    elif kind == 'extra':
        weights[re.sub('[0-9]+', text, key, count=i % 2)] = weights[key] + 0
    elif kind == 'prefix':
        for x in list(weights):
            weights[f'{text}.{x}' if i % 2 else x.split('.', 1)[-1]] = weights.pop(x)


KINDS = ['remove', 'remove those alike', 'remove a part', 'shape', 'shape', 'dtype', 'value', 'swap', 'number', 'name']
KINDS += ['extra', 'prefix']
PARTS = ['0', '00', '7', '12', '10000000000', 'x', '-1', '', 'backbone', 'module', 'net', 'head', 'weight', 'cls_token']
PARTS += ['\n', 'é', '\ud800', 'a' * 5000, '{rest}', 'mlp_skip', 'dist_token', 'q_bias', '9' * 5000]
WANTED = [dict(family='mpvit'), dict(family='plainvit'), dict(source='official'), dict(source='mmvitzoo')]
WANTED += [dict(family='swin'), dict(family='mvitv2', source='keras')]


@fuzz(max_examples=3000)
@given(seed=seeds)
def test_convert(samples, seed):
    random = Random(seed)
    weights = random.choice(samples)()
    wanted = random.choice(WANTED) if random.random() < 0.05 else {}
    mixed = random.random() < 0.1
    if mixed:
        weights.update(random.choice(samples)())
    mutations = random.choice([0, 1, 1, 1, 2, 2, 3])
    for _ in range(mutations):
        if weights:
            key, other = random.choices([*weights], k=2)
            mutate(weights, random.choice(KINDS), key, other, random.choice(PARTS), random.randrange(12))
    with little_memory():
        converted = well_converted(weights, **wanted)
    if not (mutations or mixed or wanted):
        assert converted is not None
    ours = [x for x in LAYOUTS if converted and x.family == converted.family and x.source == 'mmvitzoo'][:1]
    if ours and converted.source != 'mmvitzoo' and converted.state_dict.keys() >= set(ours[0].signature):
        again = convert(converted.state_dict)  # and in our names it is what it was
        assert (again.family, again.source) == (converted.family, 'mmvitzoo')
        assert again.backbone_cfg == converted.backbone_cfg and again.state_dict.keys() == converted.state_dict.keys()


@pytest.mark.parametrize(
    'form, source, theirs, extra',
    [
        ('mvitv2', 'timm', 'stages.2.blocks.0.shortcut_proj_attn.weight', 'stages.2.blocks.0.shortcut_proj_mlp.weight'),
        ('vitae', 'vitae-repository', 'backbone.blocks.1.attn.q_bias', 'backbone.blocks.1.attn.qkv.bias'),
    ],
)
def test_two_weights_for_one(form, source, theirs, extra):
    """Where several of theirs become one of ours, none is dropped silently."""
    converted = convert(slim(form, (3,)).state_dict())
    weights = export(converted.state_dict, converted.family, source)
    if theirs not in weights:
        q, _, v = weights.pop(extra).chunk(3)
        weights.update({theirs: q, theirs.replace('q_bias', 'v_bias'): v})
    assert convert(weights).state_dict.keys() == converted.state_dict.keys()
    with pytest.raises(CheckpointError, match=f'{form}/{source} .* is there (twice|beside)'):
        convert({**weights, extra: torch.zeros(3)})
