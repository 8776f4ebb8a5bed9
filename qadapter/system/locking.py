"""One process at a time, for work that several would otherwise do twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def exclusive(path: str | Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside, no other process is in here for the same path. The operating system holds the lock,
    so a process that is killed lets go of it.

    Args:
        path: what is made; the lock is a file beside it, and its folder is made.
        say: gets a line if another process is waited for.

    Raises:
        OSError: the folder can't be made or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if say is not None:
            say(f"waiting for another process that makes {path}")
        lock.acquire()
    except NotImplementedError:
        pass  # a file system without locks: files are replaced whole, only the work is done twice
    try:
        yield
    finally:
        lock.release()
