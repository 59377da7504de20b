"""Operators of torchvision for an mmcv without compiled ones: ``python -m mmvitzoo.ops install``."""

import logging
import multiprocessing
import os
import re
import shutil
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

SOURCE = Path(__file__).with_name('torchvision_ext.py')
STAMP = re.compile(r"# mmvitzoo\.ops: torchvision's operators as mmcv\._ext, version (\S+)\n")
DISTRIBUTIONS = {'mmcv', 'mmcv-full', 'mmcv-lite', 'onedl-mmcv'}


class InstallError(Exception):
    """The reason, in one line, why nothing was changed."""


def _find_mmcv() -> Path:
    """Returns the folder of the installed mmcv, without importing it."""
    spec = find_spec('mmcv')
    if spec is None or spec.origin is None:  # None is a folder without __init__.py, left by pip uninstall
        raise InstallError('mmcv is not installed: pip install mmcv-lite==2.1.0')
    return Path(spec.origin).parent


def _version(path: Path) -> Optional[str]:
    """Returns the version in the first line of an installed file; None if there is no file.

    Raises:
        InstallError: The file is not from here, or not readable.
    """
    try:
        stamp = STAMP.match(path.read_text(errors='replace'))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstallError(f'cannot read {path}: {error.strerror}') from None
    if not stamp:
        raise InstallError(f'{path} is not from mmvitzoo.ops and stays as it is')
    return stamp[1]


def _compiled(folder: Path) -> Optional[Path]:
    return next((path for path in sorted(folder.glob('_ext.*')) if path.suffix in ('.so', '.pyd')), None)


def status(folder: Optional[Path] = None) -> str:
    """Says where the operators of mmcv come from.

    Args:
        folder: Folder of mmcv. The one that Python would import by default.

    Raises:
        InstallError: There is no mmcv, or two distributions of it, or an ``_ext.py`` of someone else.
    """
    folder = folder or _find_mmcv()
    names = {(x.metadata['Name'] or '').lower().replace('_', '-') for x in distributions(path=[str(folder.parent)])}
    found = sorted(names & DISTRIBUTIONS)
    if len(found) > 1:
        raise InstallError(
            f'{" and ".join(found)} overwrite each other: pip uninstall {" ".join(found)}, then install one'
        )
    if _compiled(folder):
        return f'{folder}: compiled operators ({_compiled(folder).name})'
    version = _version(folder / '_ext.py')
    if version is None:
        return f"{folder}: no operators; python -m mmvitzoo.ops install brings torchvision's"
    return f"{folder}: torchvision's operators, version {version}"


def install(folder: Optional[Path] = None) -> str:
    """Copies torchvision's operators to ``_ext.py`` in the folder of mmcv; says what it did.

    Raises:
        InstallError: As in :func:`status`, or mmcv has compiled operators, its folder is not writable, or there is no
            torchvision.
    """
    folder = folder or _find_mmcv()
    status(folder)
    if _compiled(folder):
        raise InstallError(f'{folder} has compiled operators ({_compiled(folder).name}): nothing to install')
    if find_spec('torchvision') is None:
        raise InstallError('torchvision is not installed: install the version that belongs to your PyTorch')
    target, part = folder / '_ext.py', folder / f'._ext.py.{os.getpid()}'
    old, new = _version(target), _version(SOURCE)
    if old is not None and target.read_bytes() == SOURCE.read_bytes():
        return f"{target}: torchvision's operators, version {new}, are there already"
    try:
        shutil.copyfile(SOURCE, part)
        shutil.copymode(folder / '__init__.py', part)
        os.replace(part, target)
    except OSError as error:
        raise InstallError(f'cannot write {target}: {error.strerror}') from None
    finally:
        if part.exists():
            part.unlink()
    how = 'installed' if old is None else f'in place of version {old}'
    return f"{target}: torchvision's operators, version {new}, {how}"


def remove(folder: Optional[Path] = None) -> str:
    """Deletes the file that :func:`install` made; says what it did.

    Raises:
        InstallError: There is no mmcv, an ``_ext.py`` of someone else, or the folder is not writable.
    """
    target = (folder or _find_mmcv()) / '_ext.py'
    if _version(target) is None:
        return f'{target}: nothing to remove'
    try:
        target.unlink()
    except OSError as error:
        raise InstallError(f'cannot remove {target}: {error.strerror}') from None
    return f'{target}: removed'


def suggest_install() -> None:
    """Says in one line how detectors get their operators, if mmcv has none."""
    known = 'mmcv._ext' in sys.modules or find_spec('mmcv._ext') is not None
    own = 'mmvitzoo.ops' in getattr(sys, 'orig_argv', ())  # Python >= 3.10
    first = multiprocessing.parent_process() is None and os.environ.get('RANK', '0') == '0'
    if first and not known and not own:
        logging.getLogger('mmvitzoo').warning(
            'This mmcv has no compiled operators; for detectors and segmentors: python -m mmvitzoo.ops install'
        )
