"""The few names besides tensors that MMEngine's checkpoints refer to when it resumes from them.

A pickle calls functions by name. Loading only weights means resolving a closed list of names;
each one here either builds plain data or is a stand-in that refuses all but the one use that
MMEngine's files make of it.
"""

import argparse
import pickle
from typing import Any, Dict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version


def history_method(owner: Any, name: str) -> Any:
    """The only ``getattr`` that MMEngine's checkpoints make: the statistics of a HistoryBuffer."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f'refused getattr({owner!r}, {name!r})')


def empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What NumPy's ``_reconstruct`` always makes: an empty array, to be filled by its state."""
    if kind not in (np.ndarray, 'ndarray') or shape != (0,):
        raise pickle.UnpicklingError(f'refused an array that claims {shape} items before its data')
    return np.empty((0,), np.int8)


def trusted_names() -> Dict[str, Any]:
    """Full name in the pickle -> object it stands for, for files written by MMEngine."""
    from numpy import dtype, ndarray

    scalar = np.float64(0).__reduce__()[0]  # its module has another name in each NumPy
    names = {
        'builtins.getattr': history_method,
        '__builtin__.getattr': history_method,  # its name in pickles of protocol 2
        'argparse.Namespace': argparse.Namespace,
        'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
        'numpy.ndarray': ndarray,
        'numpy.dtype': dtype,
    }
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        names[f'{module}._reconstruct'] = empty_array
        names[f'{module}.scalar'] = scalar
    for code in '?bBhHiIlLqQefd':
        kind = type(dtype(code))
        names[f'{kind.__module__}.{kind.__qualname__}'] = kind
    return names


def trust_mmengine_checkpoints() -> None:
    """Lets MMEngine load the checkpoints that it wrote itself, on torch >= 2.6.

    There ``torch.load`` reads weights only, while MMEngine (0.10.7 and before) also stores its
    message hub: history buffers of NumPy arrays. Their names are admitted, and no others. Older
    torch has no such restriction and nothing is changed.
    """
    if digit_version(torch.__version__) >= digit_version('2.6.0'):
        torch.serialization.add_safe_globals([(target, name) for name, target in trusted_names().items()])
