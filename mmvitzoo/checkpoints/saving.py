"""Writing checkpoint files whole or not at all."""

import os
from pathlib import Path
from typing import Dict, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..writing import whole_file


def save(state_dict: Dict[str, Tensor], path: Union[str, Path], overwrite: bool = False) -> None:
    """Writes weights atomically: a reader sees the old file or the new one, never a half.

    Args:
        state_dict: Tensors by key.
        path: Target; ``.safetensors`` in that format, anything else as a PyTorch file with the
            weights under ``state_dict``, as MMEngine expects them. Missing folders are made.
        overwrite: Replace a file that exists.

    Raises:
        FileExistsError: The file exists and ``overwrite`` is false.
        OSError: It cannot be written; what was there is as it was.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path}: exists already and is not overwritten')
    try:
        with whole_file(path) as part:
            if path.suffix == '.safetensors':
                save_file({key: value.contiguous() for key, value in state_dict.items()}, part)
            else:
                torch.save({'state_dict': state_dict}, part)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(part, 0o666 & ~umask)  # safetensors gives 0600
    except (RuntimeError, SafetensorError) as error:  # what their writers make of a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f'{path}: cannot be written (is the disk full?): {reason}') from error
