"""Objects whose unpickling would call something."""

import builtins
import os

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class Evil:
    """Unpickled, it would call what it is given."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def attacks(target):
    """By name, objects that would make the file ``target`` or get hold of what could."""
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
