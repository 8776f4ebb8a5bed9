"""Files of texts and of prompts: one a line, or JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError


def read_texts(path: str) -> list[str]:
    """Texts of a .txt (one a line) or .jsonl (key ``text``) file.

    Raises:
        QAdapterError: missing, empty, or a line that is not what it should be.
    """
    return [text for text in _read(path, "text") if isinstance(text, str)]


def read_prompts(path: str) -> list[str | list[dict]]:
    """Prompts of a .txt (one a line) or .jsonl (key ``prompt``: text or messages) file."""
    return _read(path, "prompt", or_messages=True)


def _read(path: str, key: str, or_messages: bool = False) -> list[Any]:
    file = Path(path).expanduser()
    if file.suffix not in (".txt", ".jsonl"):
        raise QAdapterError(f"{path}: expected a .txt or .jsonl file")
    try:
        # Not splitlines(): a text may hold other separators than line feeds.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise QAdapterError(f"{path} can't be read: {error}") from error
    if file.suffix == ".txt":
        values: list[Any] = [line for line in lines if line.strip()]
    else:
        values = [_value(path, n, line, key, or_messages)
                  for n, line in enumerate(lines, 1) if line.strip()]
    if not values:
        raise QAdapterError(f"{path} is empty")
    return values


def _value(path: str, number: int, line: str, key: str, or_messages: bool) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise QAdapterError(f"{path}:{number} is not JSON: {error.msg}") from error
    if not isinstance(row, dict) or key not in row:
        seen = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise QAdapterError(f"{path}:{number} has no {key!r}, only {seen or 'nothing'}")
    value = row[key]
    messages = or_messages and isinstance(value, list) and value and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value
    )
    if not messages and not (isinstance(value, str) and value.strip()):
        wanted = "text or messages" if or_messages else "text"
        raise QAdapterError(f"{path}:{number}: {key!r} must be {wanted}")
    return value
