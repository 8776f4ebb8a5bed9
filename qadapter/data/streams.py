"""Preferences that are read as training goes: no pass over all of them, nothing kept of them but a
buffer, and a place in them that can be saved and found again."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from datasets import IterableDataset
from datasets.iterable_dataset import BufferShuffledExamplesIterable

from qadapter.data.arrow import ParquetRows, Row
from qadapter.data.json_rows import rows_in
from qadapter.data.preferences import KNOWN, Conversion
from qadapter.data.rows import ListRows, plain, without_media
from qadapter.data.sources import are_parquet, load_from_hub, local_files, local_path
from qadapter.data.spooled import Spool
from qadapter.data.unused import check_unused
from qadapter.errors import QAdapterError, beginning, listed

_SAMPLE = 1000
"""Rows that a stream's format is read off."""


class Source(Protocol):
    """Rows in an order that is the same in every pass of the same number."""

    name: str

    def rows(self, number: int, state: Any = None) -> Iterator[Row]:
        """Those of a pass, all of them or from a ``state`` on."""

    def state(self) -> Any:
        """Where the pass stands, as JSON; None where rows must be counted."""


class FileSource:
    """Rows of local files, each pass alike."""

    def __init__(self, files: list[Path], columns: Mapping[str, str] | None = None) -> None:
        self.files, self.name, self._parquet = files, listed(files), None
        for file in files:
            if not file.is_file():
                raise QAdapterError(f"{file} is no file: a stream is read more than once")
        if are_parquet(files):
            self._parquet = ParquetRows(files)
            known = {*KNOWN, *(columns or {}).values(), *self._parquet.text_columns}
            self._columns = {name: name for name in self._parquet.columns if name in known}

    def rows(self, number: int, state: Any = None) -> Iterator[Row]:
        if self._parquet is not None:
            return iter(self._parquet.take(self._columns))
        return itertools.chain.from_iterable(map(rows_in, self.files))

    def state(self) -> Any:
        return None


class DatasetSource:
    """Rows of a ``datasets.IterableDataset``; where it shuffles its shards, in every pass anew."""

    def __init__(
        self, dataset: IterableDataset, columns: Mapping[str, str] | None = None
    ) -> None:
        self.name = "the dataset"
        known = [*KNOWN, *(columns or {}).values()]
        self.dataset = without_media(dataset, known, self.name)

    def rows(self, number: int, state: Any = None) -> Iterator[Row]:
        self.dataset.set_epoch(number)
        self.dataset.load_state_dict(state)
        return iter(self.dataset)

    def state(self) -> Any:
        # Of a stream that shuffles by itself, what was in its buffer would be lost.
        return None if _has_buffer(self.dataset._ex_iterable) else self.dataset.state_dict()


def _has_buffer(rows: Any) -> bool:
    within = [getattr(rows, "ex_iterable", None), *getattr(rows, "ex_iterables", ())]
    return isinstance(rows, BufferShuffledExamplesIterable) or any(
        _has_buffer(x) for x in within if x is not None
    )


class PreferenceStream:
    """Preference pairs, one after the other, in canonical layout.

    Args:
        source: of rows.
        columns, domain, rejected_domains: as ``load_preferences``.

    Attributes:
        left_out: ``prompt_id`` of pairs that are held out, and not to be trained on.

    Raises:
        QAdapterError: no rows, no known format among the first of them, a file that can't be read.
    """

    def __init__(
        self, source: Source, *, columns: Mapping[str, str] | None = None,
        domain: str | None = None, rejected_domains: Sequence[str] | None = None,
    ) -> None:
        self.source, self.left_out = source, frozenset[str]()
        first = ListRows(itertools.islice(self._rows(0), _SAMPLE), source.name)
        if not len(first):
            raise QAdapterError(f"{source.name} holds no rows")
        self._columns = frozenset(first.columns)
        self.conversion = Conversion.of(first, source.name, columns, domain, rejected_domains)
        spool = Spool(self.conversion.features, source.name)
        for index, row in enumerate(first.rows):
            spool.extend(self.pairs_of(row, index))
        self.sample = spool.dataset()
        """Pairs of the first rows."""
        check_unused(
            self.sample, first, self.conversion.form, self.conversion.unused, source.name
        )

    def pairs_of(self, row: Row, index: int) -> list[dict[str, Any]]:
        """The pairs of a row of the source, with all columns of ``conversion.features``.

        Raises:
            QAdapterError: it has a column that counts, and none of the first rows had it.
        """
        for column in row.keys() - self._columns:
            if column in KNOWN and row[column] is not None:
                raise QAdapterError(
                    f"{self.source.name}: row {index} has {column!r}, and the first "
                    f"{_SAMPLE:,} rows, which a stream's format is read off, don't: put such a row "
                    "before them, or leave streaming out"
                )
        taken = {new: plain(row[old]) for new, old in self.conversion.taken.items() if old in row}
        return [
            {name: record.get(name) for name in self.conversion.features}
            for record in self.conversion.records(taken, index)
        ]

    def _rows(self, number: int, state: Any = None) -> Iterator[Row]:
        try:
            for row in self.source.rows(number, state):
                if not isinstance(row, Mapping):
                    raise QAdapterError(
                        f"{self.source.name}: a row is a {type(row).__name__}, not a dict"
                    )
                yield row
        except QAdapterError:
            raise
        except Exception as error:  # of the source's own code, of files, of a network
            reason = beginning(error) or type(error).__name__
            raise QAdapterError(f"{self.source.name} can't be read on: {reason}") from error


class Reading:
    """A place in the rows of a stream, pass after pass.

    Attributes:
        number: of the pass, from 0. index: of the next row in it.
    """

    def __init__(self, stream: PreferenceStream) -> None:
        self.stream, self.number, self.index = stream, 0, 0
        self._rows = stream._rows(0)
        self._ahead: list[Row] = []
        self._state: Any = None

    def next(self) -> tuple[int, Row] | None:
        """The next row and its number; None at the end of a pass."""
        row = self._ahead.pop() if self._ahead else next(self._rows, None)
        if row is None:
            return None
        self.index += 1
        return self.index - 1, row

    def start_pass(self, number: int) -> None:
        self.number, self.index, self._ahead = number, 0, []
        self._rows = self.stream._rows(number)

    def place(self) -> dict[str, Any]:
        """As JSON, with a digest of the row that comes next."""
        if not self._ahead:
            self._state = self.stream.source.state()
            self._ahead = [row for row in (next(self._rows, None),) if row is not None]
        following = _digest(self._ahead[0]) if self._ahead else None
        return {
            "pass": self.number, "row": self.index, "state": self._state, "next": following,
        }

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Where ``place`` was told: by what the source says of it, or, if other rows are there, by
        counting rows.

        Raises:
            QAdapterError: the stream doesn't give the rows that it gave then.
        """
        self.start_pass(place["pass"])
        ways = [(place["state"], 0)] if place["state"] is not None else []
        for state, skipped in [*ways, (None, place["row"])]:
            self._rows = self.stream._rows(self.number, state)
            for _ in itertools.islice(self._rows, skipped):
                pass
            row = next(self._rows, None)
            if (None if row is None else _digest(row)) == place["next"]:
                self.index, self._state = place["row"], place["state"]
                self._ahead = [] if row is None else [row]
                return
        raise QAdapterError(
            f"{self.stream.source.name} gives other rows than before: row {place['row']} of pass "
            f"{place['pass']} is not what it was, so a run can't go on in it (a stream must give "
            "the same rows each time; it is shuffled here, by shuffle_buffer)"
        )


def _digest(row: Row) -> str:
    text = json.dumps(plain(row), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def stream_preferences(
    dataset_name: str | Path, *, config: str | None = None, split: str = "train",
    columns: Mapping[str, str] | None = None, domain: str | None = None,
    rejected_domains: Sequence[str] | None = None,
) -> PreferenceStream:
    """Preference pairs of a file, a folder or a hub dataset, read as they are asked for; arguments
    as ``load_preferences``. A split is taken whole.

    Raises:
        QAdapterError: as ``load_preferences``; a format that can't be streamed.
    """
    if "[" in split or "+" in split:
        raise QAdapterError(f"split {split!r}: a stream is read whole, name a split without []")
    name = os.fspath(dataset_name)
    if (path := local_path(name)) is None:
        dataset = load_from_hub(name, config, split, streaming=True)
        source: Source = DatasetSource(dataset, columns)
    else:
        files = local_files(path, config, split)
        if files is None:
            raise QAdapterError(
                f"{path} was written by save_to_disk: it is mapped, not read into memory; leave "
                "streaming out"
            )
        source = FileSource(files, columns)
    return PreferenceStream(
        source, columns=columns, domain=domain, rejected_domains=rejected_domains
    )
