"""Preference datasets in one canonical layout, whatever they came as."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Json, List, Value

from qadapter.data.arrow import Row
from qadapter.data.formats import (
    COLUMNS,
    EXTRA_COLUMNS,
    ID_COLUMNS,
    MASK_COLUMNS,
    TOKENIZED_BY_US,
    Format,
    detect_format,
    pairs_of_row,
    used_columns,
)
from qadapter.data.report import BadRow
from qadapter.data.rows import Rows, rows_of
from qadapter.data.sources import read_rows
from qadapter.data.spooled import Spool
from qadapter.data.unused import check_unused
from qadapter.errors import QAdapterError, listed, nearest, shown

KNOWN = (*COLUMNS, *EXTRA_COLUMNS, *TOKENIZED_BY_US)
_PLAIN_MESSAGE = {"role": Value("string"), "content": Value("string")}


def load_preferences(
    dataset_name: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    domain: str | None = None,
    rejected_domains: Sequence[str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """Load preference pairs from a local path or the hub, in the canonical layout.

    Recognized by their columns: TRL's preference formats (text or conversational, with or without
    a `prompt` column, `tools` and `chat_template_kwargs` per row, or token ids), HH-RLHF
    transcripts (text that begins ``\\n\\nHuman:`` in `chosen` and `rejected`, no `prompt`), and DSP
    (`query` and `responses`). Other columns are ignored.

    Args:
        dataset_name: a .json, .jsonl (or either .gz) or .parquet file, a folder of them or of
            `Dataset.save_to_disk`, or the name of a hub dataset.
        config: the hub dataset's configuration; local data has none.
        split: hub split, or the part of a folder by file name (``train-00000.parquet``,
            ``test.jsonl``). A single file is the split "train".
        columns: canonical name → name in the source, e.g. ``{"chosen": "good_answer"}``.
        domain: for DSP, the domain whose answers are chosen.
        rejected_domains: for DSP, whose answers are rejected; default: every other domain's. Each
            gives a pair of its own.
        limit: read only this many source rows.

    Returns:
        A `datasets.Dataset` with a row a pair: `prompt`, `chosen`, `rejected` (text, or lists of
        messages, the answers without the prompt's) or `prompt_ids`, `chosen_ids`, `rejected_ids`;
        `tools` and `chat_template_kwargs` where the source has them; `row` (int64, index in the
        source), `prompt_id` (the same for equal prompts, in any dataset) and `problem` (null, or
        why the pair cannot be used, its other columns then being null: `tokenize_preferences`
        counts and drops those). It is in memory while it is small, else in a file that goes with
        this process.

    Raises:
        QAdapterError: nothing by that name, unreadable (file and line), empty, or without the
            columns needed.
    """
    if limit is not None and limit < 1:
        raise QAdapterError(f"max_rows (limit) must be at least 1, got {limit}")
    rows = read_rows(dataset_name, config=config, split=split, limit=limit)
    return _convert(rows, str(dataset_name), columns, domain, rejected_domains)


def as_preferences(
    dataset: Any,
    *,
    columns: Mapping[str, str] | None = None,
    domain: str | None = None,
    rejected_domains: Sequence[str] | None = None,
) -> Dataset:
    """`load_preferences` for data already in memory: a `datasets.Dataset` or `IterableDataset`, a
    list or generator of dicts, a dict of columns, a pandas or polars frame, an Arrow table, or a
    Torch data set of dicts.

    A dataset that is in the canonical layout is returned as it is.
    """
    canonical = {"row", "prompt_id", "problem"}
    if isinstance(dataset, Dataset) and canonical.issubset(dataset.column_names):
        return dataset
    rows = rows_of(dataset, [*KNOWN, *(columns or {}).values()])
    if not len(rows):
        raise QAdapterError("the dataset holds no rows")
    return _convert(rows, "the dataset", columns, domain, rejected_domains)


def _convert(
    rows: Rows,
    name: str,
    columns: Mapping[str, str] | None,
    domain: str | None,
    rejected_domains: Sequence[str] | None,
) -> Dataset:
    conversion = Conversion.of(rows, name, columns, domain, rejected_domains)
    spool = Spool(conversion.features, name)
    for index, row in enumerate(rows.take(conversion.taken)):
        spool.extend(conversion.records(row, index))
    pairs = spool.dataset()
    check_unused(pairs, rows, conversion.form, conversion.unused, name)
    return pairs


class Conversion(NamedTuple):
    """How the rows of a source become canonical pairs.

    Attributes:
        taken: columns that are read, canonical name → name in the source.
        unused: other columns of the source.
        features: of the pairs.
        kept: columns of the source that pairs keep as they are.
    """

    form: Format
    taken: dict[str, str]
    unused: list[str]
    features: Features
    kept: tuple[str, ...]

    @classmethod
    def of(
        cls, rows: Rows, name: str, columns: Mapping[str, str] | None, domain: str | None,
        rejected_domains: Sequence[str] | None,
    ) -> "Conversion":
        """Read off a source's columns and rows; arguments and errors as `load_preferences`."""
        mapping = _check_mapping(columns or {}, rows.columns, name)
        unmapped = [column for column in rows.columns if column not in mapping.values()]
        seen = [*unmapped, *mapping]
        taken = {column: mapping.get(column, column) for column in used_columns(seen)}
        mapped = rows.take(taken)
        form = detect_format(
            mapped, seen, name=name, domain=domain, rejected_domains=rejected_domains
        )
        tokenized_by_us = form.kind == "tokenized" and set(TOKENIZED_BY_US).issubset(seen)
        return cls(
            form, taken, [column for column in unmapped if column not in taken.values()],
            _features(form, mapped, seen), TOKENIZED_BY_US if tokenized_by_us else (),
        )

    def records(self, row: Row, index: int) -> Iterator[dict[str, Any]]:
        """The pairs of a row, which has the canonical names; `index`: in the source."""
        kept = {key: row[key] for key in self.kept}
        for pair in pairs_of_row(row, self.form):
            yield _record(pair, index) | kept


def _check_mapping(columns: Mapping[str, str], seen: Sequence[str], name: str) -> dict[str, str]:
    known = (*COLUMNS, *EXTRA_COLUMNS)
    for new, old in columns.items():
        if new not in known:
            raise QAdapterError(
                f"columns: {shown(new)} is no column of a preference dataset ({', '.join(known)}); "
                "write it as canonical name = name in the file"
            )
        if old not in seen:
            hint = nearest(str(old), map(str, seen))
            raise QAdapterError(
                f"{name} has no column {shown(old)}, only {listed(seen, 20)}{hint}"
            )
    return dict(columns)


def _features(form: Format, rows: Iterable[Row], seen: Sequence[str]) -> Features:
    if form.kind == "tokenized":
        features = dict.fromkeys(ID_COLUMNS, List(Value("int32")))
        features |= {name: List(Value("bool")) for name in MASK_COLUMNS if name in seen}
    elif form.kind == "text":
        features = dict.fromkeys(("prompt", "chosen", "rejected"), Value("string"))
    else:
        # Arrow would give every message every key of any message; JSON keeps them as they are.
        messages = List(_PLAIN_MESSAGE if _all_plain(rows, form) else Json())
        features = dict.fromkeys(("prompt", "chosen", "rejected"), messages)
    features |= {name: Json() for name in EXTRA_COLUMNS if name in seen}
    strings = dict.fromkeys(("prompt_id", "problem"), Value("string"))
    return Features(features | {"row": Value("int64")} | strings)


def _all_plain(rows: Iterable[Row], form: Format) -> bool:
    """Whether every message has a role and a content and nothing else."""
    if form.layout != "pairs":
        return True
    return all(
        message.keys() == {"role", "content"}
        for row in rows
        for key in ("prompt", "chosen", "rejected")
        if isinstance(row.get(key), list)
        for message in row[key]
        if isinstance(message, dict)
    )


def _record(pair: dict[str, Any] | BadRow, row: int) -> dict[str, Any]:
    if isinstance(pair, BadRow):
        return {"row": row, "prompt_id": _hash(["unusable", row]), "problem": str(pair)}
    return pair | {"row": row, "prompt_id": _prompt_id(pair), "problem": None}


def _prompt_id(pair: Mapping[str, Any]) -> str:
    """A hash of the prompt, blind to differences in white space and to tools."""
    if "prompt_ids" in pair:
        return _hash(list(pair["prompt_ids"]))
    prompt = pair["prompt"]
    if isinstance(prompt, str):
        # Text and a lone user turn that ask the same get the same id.
        prompt = [{"role": "user", "content": prompt}]
    return _hash(
        [
            message | {"content": " ".join((message.get("content") or "").split())}
            for message in prompt
        ]
    )


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
