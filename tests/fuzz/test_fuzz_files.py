"""Random files: the right weights or one clear error, and nothing is executed."""

import argparse
import collections
import io
import json
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from budget import fuzz, seeds
from evil import (
    CLAIMS,
    FILES,
    FORBIDDEN,
    HISTORY,
    MARK,
    Op,
    array,
    build,
    call,
    dtype,
    encode,
    little_memory,
    name,
    outcome,
    program,
    same,
    stored,
    update,
    write,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from mmvitzoo.checkpoints import reading
from mmvitzoo.checkpoints.safe_pickle import ArrayUnpickler

WEIGHTS = {'stem.weight': torch.arange(12.0).view(3, 4), 'stem.bias': torch.ones(3, dtype=torch.float16)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'weights.pth'


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Disables the log, which would be long and whose first line imports modules."""
    monkeypatch.setattr(reading, 'print_log', lambda line, logger: None)


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


@fuzz(240)
@given(seed=seeds)
def test_damaged_files(path, seed):
    """Truncated, overwritten, with bytes inserted or removed."""
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


# ---------------------------------------------------------------- hostile pickles

ALLOWED = sorted(ArrayUnpickler(io.BytesIO(), 0).names)
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
CONTEXTS = [
    lambda x: x,
    lambda x: {'model': {'w': x}},
    lambda x: {'model': {'v': array(), 'w': x}, 'epoch': 3},
    lambda x: {'model': {'v': array()}, 'args': [x]},
    lambda x: {'w': build(array(), x)},
    lambda x: {'w': array(), 'x': update(Op(b'}'), x, 'value of a strange key')},
    lambda x: {'v': stored('zip'), 'w': call('torch._utils._rebuild_parameter', x, True, {})},
    lambda x: build({'w': array()}, x),
]


@fuzz(140)
@given(form=st.sampled_from(FILES), context=st.sampled_from(CONTEXTS), tree=trees)
def test_pickles_of_allowed_names(path, form, context, tree):
    """Any combination of the known names: nothing is executed and no global changes."""
    with little_memory():
        write(path, form, program(context(tree)))
        outcome(path)


@fuzz(90)
@given(
    form=st.sampled_from(FILES),
    context=st.sampled_from(CONTEXTS),
    bomb=st.sampled_from(FORBIDDEN) | st.text(min_size=1, max_size=9).map('x.{}'.format),
    attribute=st.sampled_from(['', '.__init__', '.__globals__', '.system']),
    args=st.lists(st.sampled_from(TEXTS) | trees, max_size=3),
    depth=st.integers(0, 20),
    use=st.sampled_from(['call', 'chain', 'attribute', 'new', 'state', 'object']),
)
def test_unknown_names_anywhere(path, form, context, bomb, attribute, args, depth, use):
    """An unknown name ends the reading, in any position and use."""
    bomb = name((bomb + attribute).replace('\n', ''))
    if use == 'chain':
        bomb = call('builtins.getattr', bomb, '__globals__')
    elif use == 'attribute':
        bomb = call('builtins.getattr', name(HISTORY), attribute[1:])
    elif use == 'new':
        bomb = Op(b'\x81', bomb, tuple(args))
    elif use == 'state':
        bomb = build(call(HISTORY), {'mean': bomb})
    elif use == 'call':
        bomb = call(bomb, *args)
    for i in range(depth):
        bomb = [bomb] if i % 3 else {'state_dict': bomb}
    with little_memory():
        write(path, form, program(context(bomb)))
        assert outcome(path) is None and not TARGET.exists()


OPCODES = [
    value for key, value in vars(pickle).items() if re.fullmatch('[A-Z][A-Z0-9_]+', key) and type(value) is bytes
]


@fuzz(70)
@given(
    form=st.sampled_from(FILES),
    opcodes=st.lists(st.sampled_from(OPCODES) | st.binary(max_size=3) | leaves.map(encode), max_size=30).map(b''.join),
)
def test_random_opcodes(path, form, opcodes):
    with little_memory():
        write(path, form, b'\x80\x04' + opcodes)
        outcome(path)


# ---------------------------------------------------------------- claims of more data than the file has

huge = st.sampled_from([2**31 - 1, 2**32 - 1, 2**33, 10**12, 2**62, 2**63 - 1, 2**64 - 1]) | st.integers(2**31, 2**66)


@fuzz(40)
@given(
    form=st.sampled_from(FILES), context=st.sampled_from(CONTEXTS), claim=st.sampled_from([*CLAIMS.values()]), n=huge
)
def test_claims(path, form, context, claim, n):
    with little_memory():
        write(path, form, program(context(claim(n))))
        outcome(path)


@fuzz(40)
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


@fuzz(60)
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
    """Any names, methods and sizes of members: nothing is written, and loaded weights are right."""
    usual = {'a/version': b'3\n', 'a/data.pkl': program({'w': stored('zip', key=key)}), 'a/data/0': bytes(16)}
    usual = [(*member, zipfile.ZIP_STORED) for member in usual.items()]
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # names that occur twice
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


# ---------------------------------------------------------------- valid files of any content


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
    """Returns the weights that `load` should find."""
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


@fuzz(70)
@given(
    form=st.sampled_from(['zip', 'legacy']),
    content=wrapped | st.sampled_from([*OTHERS, *TENSORS, endless()]),
    strange=st.sampled_from([None] * 9 + STRANGE),
)
def test_contents_of_torch_files(path, form, content, strange):
    """Nested and mixed contents: exactly the weights, or an error if there are none or unreadable ones."""
    if strange is not None:
        content = {'x': strange, 'y': content}
    torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    loaded = outcome(path)
    if strange is None and isinstance(content, dict) and expected(content):
        same(loaded, expected(content))
    else:
        assert loaded is None


@fuzz(40)
@given(protocol=st.integers(2, 5), content=wrapped, order=st.sampled_from('CF'))
def test_contents_of_array_pickles(path, protocol, content, order):
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
