"""One process at a time: for work that several would otherwise do twice, and for folders that two
runs would both write.

The operating system holds a lock, so a process that is killed lets go of it. File systems without
locks exist; there the owner that a lock file names decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import psutil

from qadapter.errors import QAdapterError

RUN_LOCK_NAME = "_run.lock"
"""transformers uploads no file whose name begins like this."""
_CLOCKS_APART = 5.0
"""Seconds by which the start of one process may seem to move when the clock is set."""


@contextlib.contextmanager
def exclusive(path: str | Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside, no other process is in here for the same path.

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


# --- who holds a lock -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, as a lock file names it."""

    pid: int
    host: str
    started: float
    """Seconds since 1970."""
    boot: str
    """Changes when the host is started again."""
    namespace: str
    """Where ``pid`` counts: a container has a number 1 of its own."""

    @classmethod
    def this_process(cls) -> Owner:
        pid = os.getpid()
        return cls(pid, platform.node(), psutil.Process(pid).create_time(), _boot(), _namespace())

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """None where the file is not there, or names none (yet)."""
        try:
            owner = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        kinds = {"pid": int, "host": str, "started": float, "boot": str, "namespace": str}
        right = all(type(getattr(owner, name)) is kind for name, kind in kinds.items())
        return owner if right else None

    def lives(self) -> bool | None:
        """Whether the process is still there; None for one of another host or container."""
        if self.host != platform.node():
            return None
        if self.boot != _boot():
            return False
        if self.namespace != _namespace():
            return None
        try:
            started = psutil.Process(self.pid).create_time()
        except (psutil.Error, ValueError, OverflowError):
            return False
        return abs(started - self.started) < _CLOCKS_APART  # else the number went to another

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {since}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


# --- locks that name who holds them ---------------------------------------------------------

_held: dict[Path, int] = {}
"""Lock file → the descriptor that holds it."""


def take(path: Path) -> bool:
    """Lock a file without waiting, and write this process into it; it is held until ``let_go`` or
    the process ends. False if another process has it, or this one already.

    Args:
        path: absolute.

    Raises:
        OSError: the file can't be made or written.
    """
    while path not in _held:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _locks(path, descriptor):
                return False
            if not _is(path, descriptor):
                continue  # its last holder has just removed it
            text = json.dumps(dataclasses.asdict(Owner.this_process())) + "\n"
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, text.encode(), 0)
            _held[path] = descriptor
            return True
        finally:
            if _held.get(path) != descriptor:
                os.close(descriptor)
    return False


def holds(path: Path) -> bool:
    """Whether this process has what ``take`` took."""
    return path in _held


def let_go(path: Path) -> None:
    """Give back what ``take`` took, and remove the file."""
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(_held.pop(path))


def _locks(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        owner = Owner.read(path)
        return owner is None or not owner.lives()
    return True


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _forget_in_child() -> None:
    """A forked worker that outlives its parent must not keep the parent's locks."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def remove_stale(path: Path) -> None:
    """Remove a lock file that nobody holds."""
    with contextlib.suppress(OSError):
        if path.is_file() and take(path):
            let_go(path)


def lock_of(folder: str | Path, *, beside: bool = False) -> Path:
    """The lock file of a run that writes to a folder; arguments as in ``sole_run``."""
    real = Path(os.path.realpath(folder))  # resolve() raises on a link to itself
    return real.with_name(f".{real.name}.lock") if beside else real / RUN_LOCK_NAME


@contextlib.contextmanager
def sole_run(folder: str | Path, *, beside: bool = False) -> Iterator[None]:
    """Inside, no other run writes to a folder. The run itself may enter again.

    Args:
        folder: is there.
        beside: the lock lies beside the folder, which needn't be there and stays empty.

    Raises:
        QAdapterError: another run is in it; names its process.
        OSError: the folder can't be written.
    """
    path = lock_of(folder, beside=beside)
    if path in _held:
        yield
        return
    if not take(path):
        raise QAdapterError(
            f"output_dir {folder} is being written by another run "
            f"({Owner.read(path) or 'which is just starting'}): wait for it, or choose another "
            "folder"
        )
    try:
        yield
    finally:
        let_go(path)
