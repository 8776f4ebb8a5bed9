"""Regular expressions that others wrote, matched in bounded time."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import regex

from qadapter.errors import QAdapterError, shown

SECONDS = 2.0
"""A processor may search one text that long: what takes longer tries more ways than there are."""
MAX_LENGTH = 2000
"""Of a pattern, in characters."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A regular expression, as Python's ``re`` writes it.

    Raises:
        QAdapterError: it is none, or longer than ``MAX_LENGTH``.
    """

    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MAX_LENGTH:
            raise QAdapterError(
                f"a regular expression has {len(self.text):,} characters, more than {MAX_LENGTH:,}"
            )
        try:
            self._compiled  # noqa: B018 - it raises
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise QAdapterError(
                f"{shown(self.text)} is no regular expression: {error}"
            ) from error

    @cached_property
    def _compiled(self) -> regex.Pattern[str]:
        return regex.compile(self.text)

    @property
    def groups(self) -> int:
        return self._compiled.groups

    def findall(self, text: str) -> list[Any]:
        """As ``re.findall``.

        Raises:
            QAdapterError: it takes more than ``SECONDS``.
        """
        try:
            return self._compiled.findall(text, timeout=SECONDS)
        except TimeoutError as error:
            raise QAdapterError(
                f"the regular expression {shown(self.text)} comes to no end on {shown(text)}: "
                "write it without repetitions within repetitions"
            ) from error
