"""Rows of JSON files: a list of objects, or one object a line."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qadapter.data.arrow import Again, Row
from qadapter.data.rows import ListRows, Rows, plain
from qadapter.errors import QAdapterError, listed
from qadapter.system.documents import parse_json
from qadapter.system.textfiles import decode, lines_of, read_bytes, split_lines

_WHOLE = 4 * 2**20
"""Bytes of text up to which files are read once, as a whole. Larger ones are read line by line,
each time their rows are gone through."""
_SHRUNK = 8
"""What text is about, in sizes of its .gz."""


def read_json_files(files: Sequence[Path], limit: int | None) -> Rows:
    """Rows of files one after the other, up to ``limit`` of them.

    Raises:
        QAdapterError: a file that can't be read or is not what it should be (with its line).
    """
    if sum(map(_size, files)) > _WHOLE:
        return JsonRows(files, limit)
    rows: list[Row] = []
    for file in files:
        left = None if limit is None else limit - len(rows)
        rows += itertools.islice(_rows_of_text(_text(file), file), left)
    return ListRows(rows, listed(files))


def _size(file: Path) -> int:
    """About how much text it holds; a pipe, which is read but once, holds none."""
    try:
        size = file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0  # said when it is read
    return size * (_SHRUNK if file.name.endswith(".gz") else 1)


class JsonRows:
    """Rows of large JSON Lines files, of which one is in memory at a time. A file that is one JSON
    list is read whole each time."""

    def __init__(
        self, files: Sequence[Path], limit: int | None = None, rows: range | None = None,
        columns: list[str] | None = None,
    ) -> None:
        self.files = files
        if rows is None or columns is None:
            seen: dict[str, None] = {}
            count = 0
            for row in self._all(limit):
                seen |= dict.fromkeys(row)
                count += 1
            rows, columns = range(count), list(seen)
        self.rows, self.columns, self.text_columns = rows, columns, columns

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> JsonRows:
        return JsonRows(self.files, rows=self.rows[start:stop], columns=self.columns)

    def take(self, names: Mapping[str, str]) -> Iterable[Row]:
        return Again(lambda: (
            {new: plain(row[old]) for new, old in names.items() if old in row}
            for number, row in enumerate(self._all(self.rows.stop)) if number >= self.rows.start
        ))

    def _all(self, limit: int | None) -> Iterator[Row]:
        count = 0
        for file in self.files:
            for row in rows_in(file):
                if limit is not None and count >= limit:
                    return
                count += 1
                yield row


def rows_in(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file; raises as ``read_json_files``."""
    for line in lines_of(file, errors="surrogatepass"):
        if line.strip():
            if line.lstrip().startswith("["):
                yield from _rows_of_text(_text(file), file)
            else:
                yield from _rows_of_lines(lines_of(file, errors="surrogatepass"), file)
            return


def _rows_of_text(text: str, file: Path) -> Iterator[dict[str, Any]]:
    """A JSON list of objects, or one object a line; told apart by the first character."""
    if text.lstrip()[:1] != "[":
        yield from _rows_of_lines(split_lines(text), file)
        return
    for index, row in enumerate(parse_json(text, file, line=1, surrogates=True)):
        if not isinstance(row, dict):
            raise QAdapterError(f"{file}: row {index} is a {type(row).__name__}, not an object")
        yield row


def _rows_of_lines(lines: Iterable[str], file: Path) -> Iterator[dict[str, Any]]:
    first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, file, line=number, surrogates=True)
        except QAdapterError:
            if first:
                _refuse_single_object(file)
            raise
        if not isinstance(row, dict):
            raise QAdapterError(f"{file}:{number} holds a {type(row).__name__}, not an object")
        first = False
        yield row


def _text(file: Path) -> str:
    return decode(read_bytes(file), file, errors="surrogatepass")


def _refuse_single_object(file: Path) -> None:
    """Raise when the file is one object over several lines, which reads as bad JSON Lines."""
    try:
        value = parse_json(_text(file), file, surrogates=True)
    except QAdapterError:
        return
    keys = f" with the keys {listed(value)}" if isinstance(value, dict) else ""
    raise QAdapterError(
        f"{file} holds one JSON {type(value).__name__}{keys}; rows must be a JSON list of objects, "
        "or one object a line"
    )
