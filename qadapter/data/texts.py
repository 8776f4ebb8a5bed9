"""Files of texts and of prompts: one a line, or JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qadapter.data.encoding import Prompt
from qadapter.data.formats import extras_of
from qadapter.data.messages import normal_messages
from qadapter.data.report import BadRow
from qadapter.errors import QAdapterError, listed
from qadapter.system.documents import parse_json
from qadapter.system.textfiles import is_unicode, read_text, split_lines

_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def read_texts(path: str) -> list[str]:
    """Texts of a .txt (one a line) or .jsonl (key ``text``) file, or either of them as .gz.

    Lines end as `split_lines` has it; encodings are `read_text`'s.

    Raises:
        QAdapterError: missing, empty, or a line that is not what it should be.
    """
    return [text for text in _read(path, "text") if isinstance(text, str)]


def read_prompts(path: str) -> list[Prompt]:
    """Prompts of such a file, .jsonl with the key ``prompt`` (text or messages) and perhaps
    ``tools`` and ``chat_template_kwargs``, as rows of training data have them."""
    return _read(path, "prompt", or_messages=True)


def _read(path: str, key: str, or_messages: bool = False) -> list[Any]:
    name = Path(path).name
    if not name.endswith(_SUFFIXES):
        raise QAdapterError(f"{path}: expected a .txt or .jsonl file (or .gz)")
    numbered = enumerate(split_lines(read_text(path)), 1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if name.removesuffix(".gz").endswith(".jsonl"):
        values = [_value(path, number, line, key, or_messages) for number, line in lines]
    else:
        values = [line for _, line in lines]
    if not values:
        raise QAdapterError(f"{path} is empty")
    return values


def _value(path: str, number: int, line: str, key: str, or_messages: bool) -> Any:
    row = parse_json(line, path, line=number, surrogates=True)
    if not isinstance(row, dict) or key not in row:
        seen = listed(row) if isinstance(row, dict) else type(row).__name__
        raise QAdapterError(f"{path}:{number} has no {key!r}, only {seen or 'nothing'}")
    value = row[key]
    messages = or_messages and isinstance(value, list) and value
    if not messages and not (isinstance(value, str) and value.strip()):
        wanted = "text or messages" if or_messages else "text"
        raise QAdapterError(f"{path}:{number}: {key!r} must be {wanted}")
    if not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise QAdapterError(f"{path}:{number}: {key!r} holds half of a surrogate pair")
    if not or_messages:
        return value
    try:
        value = normal_messages(value, key) if messages else value
        more = extras_of(row)
    except BadRow as bad:
        raise QAdapterError(f"{path}:{number}: {bad.description}") from bad
    return {key: value, **more} if more else value
