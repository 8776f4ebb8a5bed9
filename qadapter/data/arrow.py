"""Rows of Arrow data: datasets, tables, Parquet files.

Values are taken as Arrow has them. What a file says its columns are besides (images, sounds: cells
that name a file or an address, or hold its bytes) is never carried out: nothing is decoded, opened
or fetched for a row. Only columns that are asked for are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Json

from qadapter.errors import QAdapterError, listed
from qadapter.system.documents import parse_json
from qadapter.system.textfiles import ZIPPED_BYTES, ZIPPED_TIMES

Row = Mapping[str, Any]
_BATCH = 1000
_PLAIN_FEATURES = (
    "Value", "List", "LargeList", "Sequence", "Json", "ClassLabel", "Translation",
    "TranslationVariableLanguages",
)
"""Types of `datasets` that say of a column no more than Arrow does."""


class Again:
    """An iterable that begins anew each time."""

    def __init__(self, make: Callable[[], Iterator[Row]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Row]:
        return self.make()


class ArrowRows:
    """Rows of an Arrow-backed dataset or a table, without the nulls Arrow fills into keys a row
    never had.

    In Arrow every message of a column has every key of every other message; a template that asks
    whether `message.tool_calls` is defined must not find those. Top-level nulls stay.
    """

    def __init__(self, source: Dataset | pa.Table, name: str = "the dataset") -> None:
        self.source, self.name = source, name
        declared: Mapping[str, str | None]
        self.columns = list(source.column_names)
        if isinstance(source, Dataset):
            schema = source.features.arrow_schema
            declared = {column: media_of(feature) for column, feature in source.features.items()}
        else:
            schema, declared = source.schema, declared_media(source.schema)
        # Of a name that stands twice, neither column can be meant.
        twice = {column for column in self.columns if self.columns.count(column) > 1}
        self._kinds = {field.name: field.type for field in schema if field.name not in twice}
        self._media = {
            column: media
            for column, kind in self._kinds.items()
            if (media := declared.get(column) or _binary(kind))
        }
        self.text_columns = [
            column for column, kind in self._kinds.items()
            if is_text(kind) and column not in self._media
        ]

    def __len__(self) -> int:
        return len(self.source)

    def part(self, start: int, stop: int) -> ArrowRows:
        stop = min(stop, len(self.source))
        if isinstance(self.source, Dataset):
            return ArrowRows(self.source.select(range(start, stop)), self.name)
        return ArrowRows(self.source.slice(start, stop - start), self.name)

    def take(self, names: Mapping[str, str]) -> Iterable[Row]:
        for old in names.values():
            if old not in self._kinds:
                raise QAdapterError(f"{self.name} has several columns {old!r}: rename them")
            if old in self._media:
                refuse_media(self.name, old, self._media[old])
        return Again(lambda: self._rows(names))

    def _rows(self, names: Mapping[str, str]) -> Iterator[Row]:
        for table in self._batches(sorted(set(names.values()))):
            columns = [self._values(table.column(old), old) for old in names.values()]
            for number in range(len(table)):
                yield {
                    new: column[number] for new, column in zip(names, columns, strict=True)
                }

    def _batches(self, columns: list[str]) -> Iterator[pa.Table]:
        if not columns:
            return
        if isinstance(self.source, Dataset):
            yield from self.source.select_columns(columns).with_format("arrow").iter(_BATCH)
            return
        for batch in self.source.select(columns).to_batches(max_chunksize=_BATCH):
            yield pa.Table.from_batches([batch])

    def _values(self, cells: pa.ChunkedArray, column: str) -> list[Any]:
        parse = _json_in(cells.type, f"{self.name}: the column {column!r}")
        try:
            cells.validate(full=True)  # a damaged file may point out of its memory
            values = cells.to_pylist()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise QAdapterError(
                f"{self.name}: the column {column!r} can't be read: {error}"
            ) from error
        return [_without_nulls(value if parse is None else parse(value)) for value in values]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _json_in(kind: pa.DataType, where: str) -> Callable[[Any], Any] | None:
    """What parses the JSON texts in a column's values; None where there are none."""
    if isinstance(kind, pa.JsonType):
        return lambda v: None if v is None else parse_json(v, where, surrogates=True)
    if _is_list(kind):
        if (item := _json_in(kind.value_type, where)) is not None:
            return lambda v: None if v is None else [item(x) for x in v]
    if pa.types.is_struct(kind):
        fields = {field.name: _json_in(field.type, where) for field in kind}
        if any(fields.values()):
            return lambda v: None if v is None else {
                name: value if (parse := fields[name]) is None else parse(value)
                for name, value in v.items()
            }
    return None


# --- what a column is -----------------------------------------------------------------------------


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold texts or messages."""
    if _is_list(kind):
        kind = kind.value_type
        return pa.types.is_struct(kind) and kind.get_field_index("content") >= 0
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _binary(kind: pa.DataType) -> str | None:
    """What to call a column with bytes in it."""
    children = [kind.value_type] if _is_list(kind) else (
        [field.type for field in kind] if pa.types.is_struct(kind) else []
    )
    if any(map(_binary, children)):
        return "binary"
    types = pa.types
    binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return "binary" if binary or types.is_fixed_size_binary(kind) else None


def media_of(feature: Any) -> str | None:
    """The type of a feature, or within it, that is decoded from a file's bytes."""
    if isinstance(feature, dict):
        return next(filter(None, map(media_of, feature.values())), None)
    if isinstance(feature, list):
        return media_of(feature[0])
    if hasattr(feature, "feature"):
        return media_of(feature.feature)
    decoded = hasattr(feature, "decode") and not isinstance(feature, Json)
    return type(feature).__name__ if decoded else None


def declared_media(schema: pa.Schema) -> dict[str, str]:
    """Column → what `datasets` would decode in it, of those that the schema's metadata says so of.
    The metadata is read as JSON: no type it names is made."""
    text = (schema.metadata or {}).get(b"huggingface", b"null").decode("utf-8", "replace")
    try:
        features = parse_json(text, "metadata")["info"]["features"].items()
    except (QAdapterError, TypeError, LookupError, AttributeError):
        return {}
    return {column: kind for column, feature in features if (kind := _declared(feature))}


def _declared(feature: Any) -> str | None:
    if isinstance(feature, list):
        return next(filter(None, map(_declared, feature)), None)
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if isinstance(kind, str) and kind not in _PLAIN_FEATURES:
        return kind
    return next(filter(None, map(_declared, feature.values())), None)


def refuse_media(name: str, column: str, media: str) -> None:
    raise QAdapterError(
        f"{name}: the column {column!r} holds {media} values; preferences are text, messages "
        "or token ids (columns={'prompt': 'name of another column'} maps one)"
    )


# --- Parquet --------------------------------------------------------------------------------------


class ParquetRows:
    """Rows of Parquet files, of which only the columns taken are read."""

    def __init__(self, files: Sequence[Path], rows: range | None = None) -> None:
        self.files, count = files, 0
        columns: dict[str, Any] = {}
        texts: dict[str, Any] = {}
        for file in files:
            metadata = _read_parquet(file, pq.read_metadata)
            schema = _read_parquet(file, lambda _, m=metadata: m.schema.to_arrow_schema())
            columns |= dict.fromkeys(schema.names)
            texts |= dict.fromkeys(ArrowRows(schema.empty_table()).text_columns)
            count += metadata.num_rows
        self.columns, self.text_columns = list(columns), list(texts)
        self.rows = range(count) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> ParquetRows:
        return ParquetRows(self.files, self.rows[start:stop])

    def take(self, names: Mapping[str, str]) -> Iterable[Row]:
        schemas = []
        for file, _ in self._spans():
            schema = _read_parquet(file, pq.read_schema)
            there = [field for field in schema if field.name in names.values()]
            schemas.append(pa.schema(there, schema.metadata))
            if not there:
                raise QAdapterError(f"{file} has none of the columns that other files have")
            rows = ArrowRows(schemas[-1].empty_table(), listed(self.files))
            rows.take({new: old for new, old in names.items() if old in rows.columns})
        try:
            pa.unify_schemas(schemas, promote_options="default")
        except pa.ArrowException as error:
            raise QAdapterError(
                f"{listed(self.files)} do not have the same columns: {error}"
            ) from error
        return Again(lambda: self._rows(names))

    def _spans(self) -> Iterator[tuple[Path, range]]:
        """Files, and which of their rows are taken."""
        end = 0
        for file in self.files:
            start, end = end, end + _read_parquet(file, pq.read_metadata).num_rows
            wanted = range(max(self.rows.start, start) - start, min(self.rows.stop, end) - start)
            if wanted:
                yield file, wanted

    def _rows(self, names: Mapping[str, str]) -> Iterator[Row]:
        columns, where = sorted(set(names.values())), listed(self.files)
        for file, wanted in self._spans():
            for table in _naming(file, _read_span(file, columns, wanted)):
                there = {new: old for new, old in names.items() if old in table.column_names}
                missing: Row = dict.fromkeys(names.keys() - there.keys())
                for row in ArrowRows(table, where).take(there):
                    yield {**missing, **row}


def _read_parquet(file: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(file, *arguments)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise QAdapterError(f"{file} can't be read as Parquet: {error}") from error


def _naming(file: Path, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same; what is wrong with the file is said when it is met."""
    while (table := _read_parquet(file, lambda _: next(tables, None))) is not None:
        yield table


def _read_span(file: Path, columns: list[str], rows: range) -> Iterator[pa.Table]:
    """These rows, from the row groups that hold them, piece by piece; raises as `limited`."""
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        groups: list[int] = []
        first, start = 0, 0
        for group in range(parquet.num_row_groups):
            end = start + parquet.metadata.row_group(group).num_rows
            if start < rows.stop and end > rows.start:
                first = first if groups else start
                groups.append(group)
            start = end
        schema, at = parquet.schema_arrow, first
        columns = [column for column in columns if column in schema.names]
        for batch in limited(parquet.iter_batches(_BATCH, groups, columns), file):
            start, stop = max(rows.start - at, 0), min(rows.stop - at, len(batch))
            at += len(batch)
            if start < stop:
                part = batch.slice(start, stop - start)
                yield pa.Table.from_batches([part]).replace_schema_metadata(schema.metadata)
            if at >= rows.stop:
                return
    raise pa.ArrowInvalid(f"it has {at} rows, not {rows.stop} or more")


def limited(batches: Iterable[pa.RecordBatch], file: Path) -> Iterator[pa.RecordBatch]:
    """The same.

    Raises:
        QAdapterError: they grow like no text does (see `textfiles.ZIPPED_TIMES`).
    """
    size, most = 0, max(ZIPPED_BYTES, ZIPPED_TIMES * file.stat().st_size)
    for batch in batches:
        size += batch.nbytes
        if size > most:
            raise QAdapterError(
                f"{file} can't be read: it grows to more than {ZIPPED_TIMES} times its size; "
                "if it really holds that much, save it without compression"
            )
        yield batch
