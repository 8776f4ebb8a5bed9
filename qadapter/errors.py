"""The one exception that users are meant to see, and what its messages share."""

import difflib
from collections.abc import Iterable


class QAdapterError(Exception):
    """An error a person can act on; the CLI prints it as one line and exits with code 2.

    The message names the file, row, option or model at fault and says what would do instead. It
    holds no line breaks: `QAdapterError("a\\nb")` reads as ``a b``.
    """

    def __init__(self, message: str) -> None:
        text = " ".join(str(message).split())
        # Names of files and columns may hold what no terminal can print: half a character.
        super().__init__(text.encode("utf-8", "backslashreplace").decode())


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing."""
    found = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
