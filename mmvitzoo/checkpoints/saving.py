"""Writing checkpoint files whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Dict, Union

import torch
from safetensors.torch import save_file
from torch import Tensor


def save(state_dict: Dict[str, Tensor], path: Union[str, Path], overwrite: bool = False) -> None:
    """Writes weights atomically: a reader sees the old file or the new one, never a half.

    Args:
        state_dict: Tensors by key.
        path: Target; ``.safetensors`` in that format, anything else as a PyTorch file with the
            weights under ``state_dict``, as MMEngine expects them. Missing folders are made.
        overwrite: Replace a file that exists.

    Raises:
        FileExistsError: The file exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path}: exists already and is not overwritten')
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(descriptor)
    try:
        if path.suffix == '.safetensors':
            save_file({key: value.contiguous() for key, value in state_dict.items()}, part)
        else:
            torch.save({'state_dict': state_dict}, part)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)  # mkstemp gives 0600
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
