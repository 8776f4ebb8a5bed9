"""Runs of ``qadapter`` in processes that are forked from one which has imported everything: a run
on a tiny model then takes a second, and can be killed where one likes.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import mmap
import os
import resource
import select
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from imports import import_all, leave_to_stay

from qadapter.cli import main
from qadapter.training import feature_store

CPU_SECONDS, WALL_SECONDS = 40, 400
"""A run that takes longer hangs: all of them take about a second of a processor."""
MEMORY = 4 << 30
"""Bytes of its own that a run may take before the system refuses it more."""


def warm() -> None:
    """Import what the commands need."""
    import_all()
    feature_store._MOST_PAIRS = 3  # a few pairs are several files
    leave_to_stay()


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where a run is ended from outside.

    "moment": after ``at`` processor seconds. "operation": before the file operation number ``at``.
    "write": in the file that is the ``at``-th to be opened for writing (or the next that is long
    enough), when ``size`` bytes of it are written.
    """

    kind: Literal["moment", "operation", "write"]
    at: float
    size: int = 0
    signal: signal.Signals = signal.SIGKILL
    with_children: bool = True
    """Whether processes that it started go too, as when a machine goes down."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Negative: of the signal that ended it."""
    out: str
    err: str
    seconds: float
    """Of a processor."""
    peak: int
    """Most resident memory, bytes; what it shares with the process it was forked from is in it."""
    operations: int
    writes: int
    last: str
    """The last file operation."""
    hung: bool

    @property
    def error(self) -> str | None:
        """The line that an error ends in."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return lines[-1] if lines else None

    def wrong(self) -> str | None:
        """What no run may do: hang, end by itself in a signal, show a traceback, end in an error
        that is not one line."""
        if self.hung:
            return f"hangs: {self.seconds:.0f} s of a processor"
        if "Traceback (most recent call last)" in self.err + self.out:
            return "traceback: " + self.err.strip().splitlines()[-1][:300]
        if self.code not in (0, 2):
            return f"ended with {self.code}: {self.err.strip()[-300:]}"
        if self.code == 2:
            lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
            if len(lines) != 1 or not self.err.endswith(lines[0] + "\n"):
                return f"not one line of error: {self.err[-300:]!r}"
            if len(lines[0]) > 2000:
                return f"a line of {len(lines[0])} characters: {lines[0][:200]!r}"
        return None


def run(argv: Sequence[str], home: Path, stop: Stop | None = None) -> Ended:
    """``qadapter ARGV`` in a process of its own.

    Args:
        home: the working folder, that of caches and that of temporary files; operations on files
            elsewhere don't count.
    """
    return call(lambda: main(list(argv)), home, stop)


def at_once(runs: Sequence[tuple[Sequence[str], Path, Stop | None]]) -> list[Ended]:
    """Several of ``run``, which begin together."""
    pipes = []
    for argv, home, stop in runs:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                text = json.dumps(dataclasses.asdict(run(argv, home, stop)))
                with open(write, "w") as file:
                    file.write(text)
            finally:
                os._exit(0)
        os.close(write)
        pipes.append((pid, read))
    ended = []
    for pid, read in pipes:
        with open(read) as file:
            ended.append(Ended(**json.load(file)))
        os.waitpid(pid, 0)
    return ended


def call(function: Callable[[], None], home: Path, stop: Stop | None = None) -> Ended:
    """The same with any function; what it returns is lost."""
    pipes = [_pipe(), _pipe()]
    told = mmap.mmap(-1, _Watch.SIZE)  # shared with the child, and still there when it is killed
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(function, home, stop, [write for _, write in pipes], told)
    for _, write in pipes:
        os.close(write)
    texts, hung = _wait(pid, [read for read, _ in pipes])
    if hung or stop is None or stop.with_children:
        _kill_group(pid)
    _, status, used = os.wait4(pid, 0)
    for (read, _), text in zip(pipes, texts, strict=True):
        text += _drain(read)
        os.close(read)
    out, err = (bytes(text).decode(errors="replace") for text in texts)
    operations, writes, last = _Watch.read(told)
    told.close()
    return Ended(
        os.waitstatus_to_exitcode(status), out, err, used.ru_utime + used.ru_stime,
        used.ru_maxrss << 10, operations, writes, last, hung,
    )


def _child(
    function: Callable[[], None], home: Path, stop: Stop | None, outputs: list[int], told: mmap.mmap
) -> None:
    code: object = 1
    try:
        # What the parent wants done at its end is not this process's business.
        atexit._clear()
        weakref.finalize._registered_with_atexit = False
        os.setsid()
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (
            open(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
            for number in (1, 2)
        )
        home = home.resolve()
        (home / "tmp").mkdir(exist_ok=True)
        os.chdir(home)
        os.environ.update(
            HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), TMPDIR=str(home / "tmp"),
            COLUMNS="100",
        )
        tempfile.tempdir = None
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        sys.addaudithook(_Watch(home, told, stop))
        if stop is not None and stop.kind == "moment":
            # By the kernel, or, for a signal that a program may answer, between two instructions
            # of Python as any signal is.
            if stop.signal != signal.SIGKILL:
                signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), stop.signal))
            signal.setitimer(signal.ITIMER_PROF, max(1e-4, stop.at))
        function()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


class _Watch:
    """Counts what a process does to files below a folder, and ends it where it is told to."""

    SIZE = 1024

    def __init__(self, home: Path, told: mmap.mmap, stop: Stop | None):
        self.home, self.told, self.stop = str(home), told, stop
        self.operations = self.writes = 0

    def __call__(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"):
            path = args[0]
        else:
            return
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
        if path.startswith("/") and not path.startswith(self.home):
            return
        stop = self.stop
        if stop is not None and stop.kind == "operation" and self.operations == int(stop.at):
            os.kill(os.getpid(), stop.signal)
        if event == "open":
            if stop is not None and stop.kind == "write" and self.writes == int(stop.at):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
                resource.setrlimit(resource.RLIMIT_FSIZE, (stop.size, stop.size))
            self.writes += 1
        self.operations += 1
        last = f"{event} {path.removeprefix(self.home + '/')}"[:400].encode(errors="replace")
        header = self.operations.to_bytes(4, "little") + self.writes.to_bytes(4, "little")
        self.told[: 8 + len(last) + 1] = header + last + b"\0"

    @classmethod
    def read(cls, told: mmap.mmap) -> tuple[int, int, str]:
        data = told[:]
        return (
            int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little"),
            data[8:].split(b"\0")[0].decode(errors="replace"),
        )


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    return read, write


def _wait(pid: int, reads: list[int]) -> tuple[list[bytearray], bool]:
    """Read what a child says until it is a zombie, or takes too long."""
    texts: list[bytearray] = [bytearray() for _ in reads]
    ended, start = os.pidfd_open(pid), time.monotonic()
    ticks, stat = os.sysconf("SC_CLK_TCK"), Path(f"/proc/{pid}/stat")
    try:
        while True:
            ready, _, _ = select.select([ended, *reads], [], [], 1.0)
            for read, text in zip(reads, texts, strict=True):
                if read in ready:
                    text += _drain(read)
            if ended in ready:
                return texts, False
            used = sum(map(int, stat.read_text().rsplit(")", 1)[1].split()[11:13])) / ticks
            if used > CPU_SECONDS or time.monotonic() - start > WALL_SECONDS:
                return texts, True
    finally:
        os.close(ended)


def _drain(read: int) -> bytes:
    found = bytearray()
    try:
        while data := os.read(read, 1 << 16):
            found += data
    except BlockingIOError:
        pass
    return bytes(found)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
