"""How long work says how far it is: what libraries take as a callback, and who shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from tqdm.auto import tqdm

Progress = Callable[[int, int], None]
"""Called with (done, of how many)."""
Reporter = Callable[[str, str], AbstractContextManager[Progress]]
"""(what is done, the unit it is counted in) → a context to do it in, which gives the callback."""


@contextlib.contextmanager
def silent(description: str, unit: str) -> Iterator[Progress]:
    """A ``Reporter`` that shows nothing."""
    yield lambda done, total: None


@contextlib.contextmanager
def tqdm_bar(description: str, unit: str) -> Iterator[Progress]:
    """A ``Reporter`` that looks like transformers' own bars."""
    with tqdm(desc=description, unit=f" {unit}", unit_scale=True) as bar:
        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
