"""Atomic writing of checkpoint files."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..models.backbones.vit_weights import METADATA_KEY, backbone_metadata


def save(state_dict: Dict[str, Tensor], path: Union[str, Path], overwrite: bool = False) -> None:
    """Writes a checkpoint atomically.

    Args:
        state_dict: Tensors by key. Metadata of a backbone are written with them, see :func:`convert`.
        path: File to write. The suffix ``.safetensors`` selects that format. Any other suffix selects a PyTorch file
            with the tensors under ``state_dict``, as MMEngine expects them. Missing folders are created.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: The file exists and ``overwrite`` is false.
        OSError: The file cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path}: exists already and is not overwritten')
    try:
        with atomic_write(path) as temporary:
            if path.suffix == '.safetensors':
                metadata = backbone_metadata(state_dict)
                entry = metadata and {METADATA_KEY: json.dumps({'backbone': {METADATA_KEY: metadata}})}
                save_file({key: value.contiguous() for key, value in state_dict.items()}, temporary, entry)
            else:
                torch.save({'state_dict': state_dict}, temporary)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # safetensors creates files with mode 0600
    except (RuntimeError, SafetensorError) as error:  # both writers raise these on a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f'{path}: cannot be written (is the disk full?): {reason}') from error


@contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """Yields a temporary file to write, which replaces the target if the block ends without an error.

    A reader sees the old file or the new one, never an incomplete one. The next write to the same target overwrites the
    temporary file of a killed process.

    Args:
        path: Target file. Missing folders are created.

    Raises:
        OSError: The file cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.part')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
