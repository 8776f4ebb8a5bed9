"""The one exception that users are meant to see, and what its messages share."""

import difflib
import reprlib
from collections.abc import Iterable

from qadapter.system.markup import visible

_MOST_CHARACTERS = 2000


class QAdapterError(Exception):
    """An error a person can act on; the CLI prints it as one line and exits with code 2.

    The message names the file, row, option or model at fault and says what would do instead. It
    holds no line breaks: `QAdapterError("a\\nb")` reads as ``a b``. Of a very long one the middle
    is left out.
    """

    def __init__(self, message: str) -> None:
        text = " ".join(str(message).split())
        if len(text) > _MOST_CHARACTERS:
            half = _MOST_CHARACTERS // 2
            text = f"{text[:half]} … {text[-half:]}"
        # Names of files and columns may hold what no terminal can print, or what it obeys.
        super().__init__(visible(text))


def shown(value: object, most: int = 100) -> str:
    """``repr(value)``, shortened to ``most`` characters or so without making more of it first."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # of a class of the user's, or a number too long for Python to print
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else text[: most - 1] + "…"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def beginning(error: BaseException) -> str:
    """The beginning of what an error says: those of other libraries may go on with a stack."""
    return " ".join(str(error).split())[:300]


def listed(names: Iterable[object], most: int = 8) -> str:
    """``a, b and 7 more``; of a very long name the middle is left out."""
    texts = [str(name) for name in names]
    short = [text if len(text) <= 200 else f"{text[:100]}…{text[-99:]}" for text in texts[:most]]
    return ", ".join(short) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing."""
    if len(name) > 100:
        return ""  # compared letter by letter
    found = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
