r"""Text that others wrote is data: in HTML, in Markdown, in pictures and on terminals.

Names of methods, data sets and files, prompts, answers and tokens show as they are, and mean
nothing to a browser, a reader of Markdown, matplotlib or a terminal.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# Control characters but tab and line feed, what breaks lines in some readers only, what turns the
# direction of writing, and halves of characters.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# As HTML's entities where raw HTML could begin: not every reader of Markdown knows "\<".
_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;"} | {sign: f"\\{sign}" for sign in "\\`*|~#$"}
)
# What begins a list, a quote or the target of links, or underlines a heading, at a line's start.
_BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$)))?((?<=\d)[.)]|[-+:](?=[\s-]|$)|[=>\[])")
_LONGEST_IN_PICTURE = 40


def visible(text: str) -> str:
    r"""Characters that act instead of being seen, as escapes: ``\x1b``, ``\u202e``, ``\ud800``.
    Tabs and line breaks stay."""
    return _ACTING.sub(lambda found: repr(found[0])[1:-1], text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """``visible``, with a single space for whatever white space there is."""
    return " ".join(visible(text).split())


def html_text(text: str) -> str:
    """For an element or a quoted attribute of HTML."""
    return html.escape(visible(text), quote=True)


def markdown_text(text: str) -> str:
    """One line of Markdown that reads as this text: in a paragraph, a heading, an item of a list or
    a cell of a table."""
    return _escaped(one_line(text))


def markdown_quote(text: str) -> str:
    """A block quote with this text, line by line."""
    lines, text = [], visible(text).strip()
    for line in text.split("\n"):
        words = line.expandtabs(4).rstrip()
        start = len(words) - len(words.lstrip(" "))
        # Spaces would make it code; two at its end keep it a line of its own.
        lines.append("> " + "&nbsp;" * start + _escaped(words[start:]) + "  " if words else ">")
    lines[-1] = lines[-1].rstrip()
    return "\n".join(lines) if text else "> (nothing)"


def markdown_code(text: str) -> str:
    """A code span with this text; not for tables."""
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # A space is taken off at each end if both have one.
    pad = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], align: str = ""
) -> str:
    """A table of texts.

    Args:
        align: a letter a column, "l" or "r"; default: all left.
    """
    marks = ["---:" if side == "r" else "---" for side in align or "l" * len(header)]
    lines = [marks if row is None else [markdown_text(str(cell)) for cell in row]
             for row in (header, None, *rows)]
    return "\n".join(re.sub(" +", " ", f"| {' | '.join(cells)} |") for cells in lines)


def markdown_list(items: Iterable[str]) -> str:
    """A list of texts."""
    return "\n".join(f"- {markdown_text(item)}" for item in items)


def picture_text(text: str) -> str:
    """For a label that matplotlib draws: no mathematics, and not too long."""
    text = one_line(text)
    if len(text) > _LONGEST_IN_PICTURE:
        text = f"{text[: _LONGEST_IN_PICTURE - 1]}…"
    # matplotlib leaves out of a legend what begins with an underscore.
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


def _escaped(line: str) -> str:
    line = line.translate(_MARKDOWN)
    # Inside a word it is an underscore; at its ends it would make it italic.
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    line = re.sub(r"\](?=[(\[:])", r"\\]", line)  # a link; [0.1, 0.2] is none
    return _BLOCK.sub(lambda found: f"{found[1] or ''}\\{found[2]}", line)
