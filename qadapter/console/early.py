"""Before a command runs. Imports next to nothing, so that an interrupt finds it ready."""

from __future__ import annotations

import os
import signal

INTERRUPTED, TERMINATED = 130, 143
"""What a shell reports of SIGINT and SIGTERM."""


class LeavingAtOnce:
    """A context for imports: libraries swallow what is raised in the midst of theirs, and nothing
    is lost yet. An interrupt, and SIGTERM, end the process with one line and the shell's code."""

    def __enter__(self) -> None:
        self._before = handle({signal.SIGINT: _leave, signal.SIGTERM: _leave})

    def __exit__(self, *_: object) -> None:
        handle(self._before)


def handle(handlers: dict) -> dict:
    """Set handlers by their signals' numbers; those before. None are where Python sets none: in
    other threads than a process's first."""
    before = {}
    for number, handler in handlers.items():
        try:
            # None: of someone who isn't Python.
            before[number] = signal.signal(number, handler or signal.SIG_DFL)
        except ValueError:
            pass
    return before


def _leave(number: int, frame: object) -> None:
    word = "interrupted" if number == signal.SIGINT else "terminated"
    os.write(2, f"error: {word}\n".encode())
    os._exit(128 + number)
