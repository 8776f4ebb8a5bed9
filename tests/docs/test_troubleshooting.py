"""What docs/troubleshooting.md quotes is what the library says, word for word."""

from __future__ import annotations

import ast
import functools
import re

from pages import ROOT, read

ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
PACKAGES = ("qadapter", "kernels/qadapter_kernels")


@functools.cache
def said() -> tuple[str, ...]:
    """Every text in the code, as one line; … for what is put into it."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(
                        part.value if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    ))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return tuple(" ".join(text.split()) for text in found)


def quoted() -> list[str]:
    return ROW.findall(read("docs/troubleshooting.md"))


def is_said(message: str) -> bool:
    """In one text of the code: its parts between the … in their order, whole words."""
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip(" :.()")]
    pattern = re.compile(r"(?<!\w)" + r".*".join(parts) + r"(?!\w)")
    return any(pattern.search(text) for text in said())


def test_every_message_is_one_of_the_librarys():
    messages = quoted()
    assert len(messages) > 30 and len(messages) == len(set(messages))
    assert [message for message in messages if not is_said(message)] == []


def test_another_message_would_be_found():
    assert not is_said("the base's features take …, … of disk are available")
    assert not is_said("… of memory are available, the base's features take …")


def test_every_row_shows_a_way_out():
    rows = [line for line in read("docs/troubleshooting.md").splitlines() if ROW.match(line)]
    assert len(rows) == len(quoted())
    for row in rows:
        _, message, why, what, _ = re.split(r"(?<!\\)\|", row)
        assert message.strip() and why.strip() and what.strip(), row
