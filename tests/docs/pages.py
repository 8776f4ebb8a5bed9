"""The pages of the documentation, read as a web host shows them: headings, links, code blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)
"""Every page whose code blocks are run."""
BESIDE = tuple(str(path.relative_to(ROOT)) for path in (
    *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("benchmarks/**/*.md")),
) if path.name != "README.md" or path.parent != ROOT)
"""Every other page."""


class Block(NamedTuple):
    """A fenced code block."""

    page: str
    line: int
    """Of the fence."""
    language: str
    """What stands behind the fence; empty where nothing does."""
    text: str

    @property
    def place(self) -> str:
        """Where it is, as editors and terminals link it."""
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in their order, without the indentation of the lists they are in.

    Raises:
        AssertionError: a fence that nothing closes; code that is marked by indentation alone, which
            says no language.
    """
    found: list[Block] = []
    fence, inside, listed, blank = None, [], False, True
    for number, line in enumerate(read(page).splitlines(), 1):
        opened = re.match(r"( *)(`{3,})(\w*) *$", line)
        if fence is None and opened:
            fence, inside = (number, *opened.groups()), []
        elif fence is not None and line.strip() == fence[2]:
            text = "\n".join(x.removeprefix(fence[1]) for x in inside)
            found.append(Block(page, fence[0], fence[3], text))
            fence = None
        elif fence is not None:
            inside.append(line)
        elif line.strip():
            entry = re.match(r" *([-*]|\d+\.) ", line)
            # Behind an empty line four spaces begin code, unless they go on with a list's entry.
            assert entry or listed or not (blank and line.startswith("    ")), (
                f"{page}:{number}: code by indentation: fence it and name its language"
            )
            listed = bool(entry) or (listed and (line.startswith(" ") or not blank))
        blank = not line.strip()
    assert fence is None, f"{page}:{fence[0]}: nothing closes this fence"
    return found


def without_blocks(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *(`{3,})\w*$.*?^ *\1$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    """A page without its code blocks and inline code."""
    return re.sub(r"`[^`\n]+(\n[^`\n]+)?`", "", without_blocks(page))


def links(page: str) -> list[str]:
    """What a page links to or shows, but for other sites."""
    found = re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose(page))
    return [target for target in found if not re.match(r"\w+:", target)]


def anchors(page: str) -> set[str]:
    """What the headings of a page are called in links, by the rule that web hosts and MyST share:
    lower case, without punctuation, spaces as hyphens."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_blocks(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = sum(bool(re.fullmatch(rf"{re.escape(name)}(-\d+)?", x)) for x in found)
        found.add(f"{name}-{count}" if count else name)
    return found
