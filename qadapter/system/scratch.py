"""Temporary folders that don't outlive a killed process for long."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qadapter.system import locking

_PREFIX = ".qadapter-"
_NAMES = f"{_PREFIX}*-????????"
_LOCK_NAME = ".owner.lock"


@contextlib.contextmanager
def scratch_folder(parent: str | Path, purpose: str) -> Iterator[Path]:
    """A temporary folder in one that is there, so that what is finished in it can be renamed to
    its place. What killed processes left in the same place is removed first.

    Args:
        purpose: one word, such as "saving", for who finds the folder.

    Raises:
        OSError: the parent is missing or can't be written.
    """
    parent = Path(parent).absolute()
    remove_abandoned(parent)
    folder = _make(parent, purpose)
    try:
        yield folder
    finally:
        _remove(folder)


def process_folder(parent: str | Path, purpose: str) -> Path:
    """A temporary folder for as long as this process lives; each call with the same arguments gives
    the same one. What killed processes left in the same place is removed first.

    Args:
        parent: is made. purpose: as in ``scratch_folder``.

    Raises:
        OSError: the parent can't be made or written.
    """
    parent = Path(parent).absolute()
    key = os.getpid(), parent, purpose  # what a fork has of its parent is its parent's
    if key not in _process_folders:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        _process_folders[key] = _make(parent, purpose)
        atexit.register(_remove_at_exit, *key)
    return _process_folders[key]


_process_folders: dict[tuple[int, Path, str], Path] = {}


def _remove_at_exit(pid: int, parent: Path, purpose: str) -> None:
    folder = _process_folders.pop((pid, parent, purpose), None) if pid == os.getpid() else None
    if folder is not None and locking.holds(folder / _LOCK_NAME):
        _remove(folder)


@contextlib.contextmanager
def replacing(path: str | Path, purpose: str = "writing") -> Iterator[Path]:
    """A place to write a new file, which then takes that of ``path``: a file there is replaced
    whole, or stays as it was.

    Args:
        purpose: as in ``scratch_folder``.

    Raises:
        OSError: its folder is missing or can't be written.
    """
    path = Path(path)
    with scratch_folder(path.parent, purpose) as scratch:
        yield scratch / path.name
        os.replace(scratch / path.name, path)


def remove_abandoned(parent: str | Path) -> None:
    """Remove scratch folders whose process is gone. Only folders that a process of ours has locked
    once, and empty ones of such a name, are taken for them."""
    for folder in sorted(Path(parent).absolute().glob(_NAMES)):
        with contextlib.suppress(OSError):  # another user's, or another process is quicker
            if folder.is_symlink() or not (folder / _LOCK_NAME).is_file():
                folder.rmdir()
            elif locking.take(folder / _LOCK_NAME):
                _remove(folder)


def _make(parent: Path, purpose: str) -> Path:
    """A new folder, locked."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{_PREFIX}{purpose}-"))
        try:
            if locking.take(folder / _LOCK_NAME):
                return folder
        except FileNotFoundError:
            pass  # still empty, it was taken for abandoned
        except OSError:
            folder.rmdir()
            raise


def _remove(folder: Path) -> None:
    """Remove a folder that this process has locked. The lock goes last: a folder that is only half
    removed when the process is killed is then found again."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name == _LOCK_NAME:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    locking.let_go(folder / _LOCK_NAME)
    with contextlib.suppress(OSError):
        folder.rmdir()
