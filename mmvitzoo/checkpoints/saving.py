"""Writes checkpoint files completely or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save(state_dict: Dict[str, Tensor], path: Union[str, Path], overwrite: bool = False) -> None:
    """Writes weights atomically: a reader sees the old file or the new one, never a part of it.

    Args:
        state_dict: Tensors by key.
        path: File to write. ``.safetensors`` selects that format. Any other name gives a PyTorch file with the weights
            under ``state_dict``, as MMEngine expects them. Missing folders are made.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: The file exists and ``overwrite`` is False.
        OSError: The file cannot be written; an existing one is unchanged.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path}: exists already and is not overwritten')
    try:
        with atomic_write(path) as part:
            if path.suffix == '.safetensors':
                save_file({key: value.contiguous() for key, value in state_dict.items()}, part)
            else:
                torch.save({'state_dict': state_dict}, part)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(part, 0o666 & ~umask)  # safetensors gives 0600
    except (RuntimeError, SafetensorError) as error:  # raised by both writers on a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f'{path}: cannot be written (is the disk full?): {reason}') from error


@contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """Yields a hidden file to write, which replaces the target when the block ends without an error.

    A killed process leaves the hidden file, which the next call overwrites.

    Args:
        path: Target. Missing folders are made.

    Raises:
        OSError: The file cannot be written; an existing target is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
