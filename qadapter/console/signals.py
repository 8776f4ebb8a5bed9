"""Ctrl-C, and SIGTERM, which schedulers and containers send before they kill."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qadapter.console.early import handle


class Terminated(BaseException):
    """SIGTERM came; the text, if there is one, says how to go on."""


@contextmanager
def raising() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt, as ever, and SIGTERM unwinds like it, so that temporary
    folders are removed and locks given back.

    Yields:
        The numbers of the signals that came: what is raised in the midst of an import may arrive
        as an error of another kind.
    """
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before = handle({signal.SIGINT: stop, signal.SIGTERM: stop})
    try:
        yield came
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
