"""SIGTERM, which schedulers and containers send before they kill."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qadapter.console.early import handle


class Terminated(BaseException):
    """SIGTERM came; the text, if there is one, says how to go on."""


@contextmanager
def raising_terminated() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that temporary folders are removed and locks given back."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = handle({signal.SIGTERM: stop})
    try:
        yield
    finally:
        handle(before)


@contextmanager
def on_termination(finish: Callable[[], bool]) -> Iterator[None]:
    """The first SIGTERM asks for an end of one's own.

    Args:
        finish: whether what is being done will soon come to an end by itself; else, and at a second
            SIGTERM, ``Terminated`` is raised.
    """
    asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        again, asked = asked, True
        if again or not finish():
            raise Terminated

    before = handle({signal.SIGTERM: stop})
    try:
        yield
    finally:
        handle(before)
