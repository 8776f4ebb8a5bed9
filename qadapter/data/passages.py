"""Passages of plain English in eight genres that come with the library: a policy can be held to
some, and what it kept is measured on the others."""

from __future__ import annotations

import json
from pathlib import Path

from qadapter.data.texts import read_texts

BUILT_IN = "built-in"
"""Names them where a file of texts could stand."""
_PATH = Path(__file__).with_name("passages.jsonl")
HELD_TO = ("story", "reference", "dialogue", "instructions")
"""Genres that a retention term may be held to; the others are for measuring."""


def passages(*, held_to: bool | None = None) -> list[str]:
    """Those that a policy may be held to, or those that are for measuring; no genre is in both.
    None: all."""
    rows = map(json.loads, _PATH.read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows if held_to in (None, row["genre"] in HELD_TO)]


def read_held_to(name: str) -> list[str]:
    """Texts to hold a policy to: ``built-in``, or a file's, as ``read_texts`` reads it."""
    return passages(held_to=True) if name == BUILT_IN else read_texts(name)
