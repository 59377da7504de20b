"""Installer of torchvision's operators for an mmcv without compiled operators: ``python -m mmvitzoo.ops install``."""

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
    """Raised when nothing was changed; the message gives the reason in one line."""


def _find_mmcv() -> Path:
    """Returns the folder of the installed mmcv, without importing it."""
    spec = find_spec('mmcv')
    if spec is None or spec.origin is None:  # no origin: a folder without __init__.py, left by pip uninstall
        raise InstallError('mmcv is not installed: pip install mmcv-lite==2.1.0')
    return Path(spec.origin).parent


def _version(path: Path) -> Optional[str]:
    """Reads the version from the first line of an installed file; None if there is no file.

    Raises:
        InstallError: The file was not written by :func:`install`, or cannot be read.
    """
    try:
        stamp = STAMP.match(path.read_text(errors='replace'))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstallError(f'cannot read {path}: {error.strerror}') from None
    if not stamp:
        raise InstallError(f'{path} was not written by mmvitzoo.ops and is left unchanged')
    return stamp[1]


def _compiled(folder: Path) -> Optional[Path]:
    """Returns the compiled module in the folder of mmcv; None if there is none."""
    return next((path for path in sorted(folder.glob('_ext.*')) if path.suffix in ('.so', '.pyd')), None)


def status(folder: Optional[Path] = None) -> str:
    """Describes which operators an mmcv has: compiled ones, torchvision's or none.

    Args:
        folder: Folder of mmcv. None: the folder from which Python imports mmcv.

    Returns:
        One line of text.

    Raises:
        InstallError: mmcv is not installed, is installed by two distributions, or has a foreign ``_ext.py``.
    """
    folder = folder or _find_mmcv()
    names = {(x.metadata['Name'] or '').lower().replace('_', '-') for x in distributions(path=[str(folder.parent)])}
    found = sorted(names & DISTRIBUTIONS)
    if len(found) > 1:
        raise InstallError(
            f'{" and ".join(found)} overwrite each other: pip uninstall {" ".join(found)}, then install one of them'
        )
    if _compiled(folder):
        return f'{folder}: compiled operators ({_compiled(folder).name})'
    version = _version(folder / '_ext.py')
    if version is None:
        return f"{folder}: no operators; install torchvision's with python -m mmvitzoo.ops install"
    return f"{folder}: torchvision's operators, version {version}"


def install(folder: Optional[Path] = None) -> str:
    """Copies torchvision's operators to ``_ext.py`` in the folder of mmcv.

    Args:
        folder: Folder of mmcv. None: the folder from which Python imports mmcv.

    Returns:
        One line that describes the change.

    Raises:
        InstallError: One of the reasons of :func:`status`. Or mmcv has compiled operators, its folder is not writable,
            or torchvision is not installed.
    """
    folder = folder or _find_mmcv()
    status(folder)
    if _compiled(folder):
        raise InstallError(f'{folder} has compiled operators ({_compiled(folder).name}): nothing to install')
    if find_spec('torchvision') is None:
        raise InstallError('torchvision is not installed: install the version that matches your PyTorch')
    target, temporary = folder / '_ext.py', folder / f'._ext.py.{os.getpid()}'
    old, new = _version(target), _version(SOURCE)
    if old is not None and target.read_bytes() == SOURCE.read_bytes():
        return f"{target}: torchvision's operators, version {new}, already installed"
    try:
        shutil.copyfile(SOURCE, temporary)
        shutil.copymode(folder / '__init__.py', temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise InstallError(f'cannot write {target}: {error.strerror}') from None
    finally:
        if temporary.exists():
            temporary.unlink()
    action = 'installed' if old is None else f'installed in place of version {old}'
    return f"{target}: torchvision's operators, version {new}, {action}"


def remove(folder: Optional[Path] = None) -> str:
    """Deletes the file that :func:`install` wrote.

    Args:
        folder: Folder of mmcv. None: the folder from which Python imports mmcv.

    Returns:
        One line that describes the change.

    Raises:
        InstallError: mmcv is not installed, has a foreign ``_ext.py``, or its folder is not writable.
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
    """Logs the command that installs the operators if mmcv has none."""
    has_operators = 'mmcv._ext' in sys.modules or find_spec('mmcv._ext') is not None
    is_installer = 'mmvitzoo.ops' in getattr(sys, 'orig_argv', ())  # Python >= 3.10
    is_main_process = multiprocessing.parent_process() is None and os.environ.get('RANK', '0') == '0'
    if is_main_process and not has_operators and not is_installer:
        logging.getLogger('mmvitzoo').warning(
            'mmcv has no compiled operators. Detectors and segmentors need them: python -m mmvitzoo.ops install'
        )
