"""Writing files whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union


@contextmanager
def whole_file(path: Union[str, Path]) -> Iterator[Path]:
    """Gives a hidden file to write, which takes the target's place when the block ends without an error.

    A reader sees the old file or the new one, never a half. What a killed process leaves, the next one
    writes over.

    Args:
        path: Target. Missing folders are made.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
