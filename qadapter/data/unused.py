"""Columns that are not used, and what that means for the prompts.

Without a `prompt` column the prompt is what both answers begin with (TRL's implicit prompts). In
data whose question stands in a column of another name, that is a word like "The" now and then.
"""

import re
import statistics
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset

from qadapter.data.formats import Format
from qadapter.data.rows import Rows
from qadapter.errors import QAdapterError

_SAMPLE = 1000
"""Rows that are looked at."""
_PROMPTS = {"prompt", "question", "instruction", "input", "query", "problem", "post"}
"""Names of columns that hold prompts."""
_PROMPT_WORDS = _PROMPTS | {
    "prompts", "questions", "instructions", "inputs", "request", "user", "message", "messages",
    "conversation", "conversations", "dialog", "dialogue", "history",
}
"""Words in such names."""
_CONTEXTS = {"system", "system_prompt", "system_message", "history", "input", "context"}
"""Names of columns that hold a part of one."""
_BETWEEN_WORDS = re.compile(r"[\W_]+")

Texts = dict[int, str]
"""Row → text, its case and white space levelled."""


def check_unused(
    pairs: Dataset, rows: Rows, form: Format, columns: Sequence[str], name: str
) -> None:
    """Refuse prompts read off the answers where another column holds them; warn of text that
    belongs to a prompt and is left out.

    Args:
        pairs: what `rows` became, one each.
        columns: the source's columns that are not used.

    Raises:
        QAdapterError: the answers hardly begin alike, or a column that is not used is the prompt.
    """
    if form.kind == "tokenized" or form.layout != "pairs":
        return
    first = pairs.select(range(min(_SAMPLE, len(pairs))))
    prompts = {row: value for row, value in enumerate(first["prompt"]) if value}
    levelled = {row: _level(value) for row, value in prompts.items()}
    if form.explicit_prompt:  # no other column is looked into
        columns = [column for column in columns if str(column).lower() in _CONTEXTS]
    unused = _read_unused(rows, columns, levelled)
    if not form.explicit_prompt:
        silent = {
            row for row, problem in enumerate(first["problem"])
            if (problem or "").startswith("prompt_differs")
        } | {row for row, value in prompts.items() if not _asks(value)}
        asked = {row: text for row, text in levelled.items() if row not in silent}
        _check_implicit(asked, silent, unused, form, name)
    for column, texts in unused.items():
        if str(column).lower() in _CONTEXTS:
            warnings.warn(
                f"{name}: the column {column!r} is not used: {len(texts)} of the first "
                f"{len(first)} rows have text in it that is not in their prompt",
                stacklevel=4,
            )


def _check_implicit(
    asked: Texts, silent: set[int], unused: dict[str, Texts], form: Format, name: str
) -> None:
    """
    Args:
        asked: what the answers of a row begin with, where that is a prompt.
        silent: rows whose answers begin with none.
    """
    total = len(asked) + len(silent)
    if not total:
        return
    found = [column for column, texts in unused.items() if len(texts) > total / 2]
    likely = [column for column in found if _may_be_prompt(column, unused[column])]
    few = len(asked) < total / 2
    # Messages say who speaks: what they share is a prompt. Text may begin alike by chance.
    chance = form.kind == "text" and not few and _are_openings(asked.values())
    if chance:
        likely = likely or [column for column in found if _is_prose(unused[column])]
    if likely and (few or form.kind == "text"):
        column = likely[0]
        raise QAdapterError(
            f"{name} has no column prompt, and the prompt is not what its answers begin with "
            f"(they share {_share(asked, total)}): is it in {', '.join(likely)}? "
            f"columns={{'prompt': {column!r}}} maps one (--columns '{{prompt: {column}}}')"
        )
    # Where nothing is left, and nothing else is there, the reasons of all rows say it better.
    if few and (found or (asked and form.kind == "text")):
        others = f"; columns that are not used: {', '.join(found)}" if found else ""
        raise QAdapterError(
            f"{name} has no column prompt, and its answers do not begin with one: they share "
            f"{_share(asked, total)}{others} (columns={{'prompt': 'name in the file'}} maps one)"
        )


def _share(asked: Texts, total: int) -> str:
    example = f", such as {next(iter(asked.values()))[:40]!r}" if asked else ""
    return f"a beginning in {len(asked)} of {total} rows{example}"


def _are_openings(beginnings: Collection[str]) -> bool:
    """Whether these are ways to begin an answer ("The", "Sure,") rather than prompts: a word or
    two, and often the same."""
    return len(set(beginnings)) <= len(beginnings) / 2 and _median_words(beginnings) < 3


def _may_be_prompt(column: str, texts: Texts) -> bool:
    name = str(column).lower()
    if name in _PROMPTS:
        return len(texts) < 3 or len(set(texts.values())) > len(texts) / 10
    return bool(set(_BETWEEN_WORDS.split(name)) & _PROMPT_WORDS) and _is_prose(texts)


def _is_prose(texts: Texts) -> bool:
    """Several words, which say something else in every few rows."""
    return len(set(texts.values())) > len(texts) / 10 and _median_words(texts.values()) > 2


def _median_words(texts: Collection[str]) -> float:
    return statistics.median(len(text.split()) for text in texts)


def _read_unused(rows: Rows, columns: Sequence[str], prompts: Texts) -> dict[str, Texts]:
    """Texts of unused columns, where they are not within their row's prompt."""
    columns = [column for column in columns if column in rows.text_columns]
    if not columns:
        return {}
    found: dict[str, Texts] = {column: {} for column in columns}
    sample = rows.part(0, _SAMPLE).take({column: column for column in columns})
    for row, values in enumerate(sample):
        for column, value in values.items():
            text = _level(value)
            if text and text not in prompts.get(row, ""):
                found[column][row] = text
    return {column: texts for column, texts in found.items() if texts}


def _level(value: Any) -> str:
    if isinstance(value, str):
        return " ".join(value.lower().split())
    if isinstance(value, list):
        contents = [m.get("content") for m in value if isinstance(m, dict)]
        return " ".join(_level(text) for text in contents if isinstance(text, str))
    return ""


def _asks(prompt: str | list[dict[str, Any]]) -> bool:
    """Whether a prompt read off the answers can be one: messages hold more than the system's."""
    return isinstance(prompt, str) or any(message["role"] != "system" for message in prompt)
