"""Rows under their canonical names, whatever holds them: lists, Arrow, Parquet files, frames, maps.

Only columns that are asked for are read, and none is decoded that holds anything but text.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Json
from datasets.table import InMemoryTable

from qadapter.errors import QAdapterError

Row = Mapping[str, Any]


class Rows(Protocol):
    """Rows that can be read again and again.

    Attributes:
        columns: names as the source has them.
        text_columns: those that may hold texts or messages.
    """

    columns: list[str]
    text_columns: list[str]

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> "Rows":
        """Rows start to stop − 1."""

    def take(self, names: Mapping[str, str]) -> Iterable[Row]:
        """The columns of `names`, which maps the name a row gets to the one in the source.

        Raises:
            QAdapterError: such a column holds images, sounds or the like.
        """


class _Again:
    """An iterable that begins anew each time."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Row]:
        return self.make()


class ListRows:
    """Dicts in memory; NumPy's and Torch's numbers, strings and arrays in them become Python's."""

    def __init__(self, rows: Iterable[Any], name: str) -> None:
        self.rows, self.name = list(rows), name
        for index, row in enumerate(self.rows):
            if not isinstance(row, Mapping):
                raise QAdapterError(f"{name}: row {index} is a {type(row).__name__}, not a dict")
        self.columns = list(dict.fromkeys(key for row in self.rows for key in row))
        self.text_columns = self.columns

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> "ListRows":
        return ListRows(self.rows[start:stop], self.name)

    def take(self, names: Mapping[str, str]) -> Iterable[Row]:
        return _Again(lambda: (
            {new: _plain(row[old]) for new, old in names.items() if old in row}
            for row in self.rows
        ))


def _plain(value: Any) -> Any:
    """Lists, dicts and Python's own scalars; a float that is no number stands for nothing."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and value != value:
        return None
    return value


class ArrowRows:
    """Rows of an Arrow-backed dataset, without the nulls Arrow fills into keys a row never had.

    In Arrow every message of a column has every key of every other message; a template that asks
    whether `message.tool_calls` is defined must not find those. Top-level nulls stay.
    """

    def __init__(self, dataset: Dataset, name: str = "the dataset") -> None:
        self.dataset, self.name = dataset, name
        self.columns = list(dataset.column_names)
        self.text_columns = _text_columns(dataset.features.arrow_schema)

    def __len__(self) -> int:
        return len(self.dataset)

    def part(self, start: int, stop: int) -> "ArrowRows":
        rows = range(start, min(stop, len(self.dataset)))
        return ArrowRows(self.dataset.select(rows), self.name)

    def take(self, names: Mapping[str, str]) -> Iterable[Row]:
        _refuse_media(self.dataset.features, names, self.name)
        # Unless selected, a row's other columns would be decoded with it.
        dataset = self.dataset.select_columns(sorted(set(names.values()))).with_format(None)
        return _Again(lambda: (
            {new: _without_nulls(row[old]) for new, old in names.items()} for row in dataset
        ))


def _text_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if _is_text(field.type)]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
        return pa.types.is_struct(kind) and kind.get_field_index("content") >= 0
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _refuse_media(features: Features, names: Mapping[str, str], name: str) -> None:
    for old in names.values():
        if media := _media(features[old]):
            raise QAdapterError(
                f"{name}: the column {old!r} holds {media} values; preferences are text, messages "
                "or token ids (columns={'prompt': 'name of another column'} maps one)"
            )


def _media(feature: Any) -> str | None:
    """The type of a feature, or within it, that is decoded from a file's bytes."""
    if isinstance(feature, dict):
        return next(filter(None, map(_media, feature.values())), None)
    if isinstance(feature, list):
        return _media(feature[0])
    if hasattr(feature, "feature"):
        return _media(feature.feature)
    decoded = hasattr(feature, "decode") and not isinstance(feature, Json)
    return type(feature).__name__ if decoded else None


class ParquetRows:
    """Rows of Parquet files, of which only the columns taken are read."""

    def __init__(self, files: Sequence[Path], rows: range | None = None) -> None:
        self.files, columns, texts, count = files, {}, {}, 0
        for file in files:
            metadata = _read_parquet(file, pq.read_metadata)
            schema = metadata.schema.to_arrow_schema()
            columns |= dict.fromkeys(schema.names)
            texts |= dict.fromkeys(_text_columns(schema))
            count += metadata.num_rows
        self.columns, self.text_columns = list(columns), list(texts)
        self.rows = range(count) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> "ParquetRows":
        return ParquetRows(self.files, self.rows[start:stop])

    def take(self, names: Mapping[str, str]) -> Iterable[Row]:
        columns, tables, end = sorted(set(names.values())), [], 0
        for file in self.files:
            start, end = end, end + _read_parquet(file, pq.read_metadata).num_rows
            wanted = range(max(self.rows.start, start) - start, min(self.rows.stop, end) - start)
            if wanted:
                tables.append(_read_parquet(file, _read_span, columns, wanted))
        where = _list(self.files)
        try:
            table = pa.concat_tables(tables, promote_options="default")
        except pa.ArrowException as error:
            raise QAdapterError(f"{where} do not have the same columns: {error}") from error
        return ArrowRows(_dataset_of(table), where).take(names)


def _read_parquet(file: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(file, *arguments)
    except (pa.ArrowException, OSError) as error:
        raise QAdapterError(f"{file} can't be read as Parquet: {error}") from error


def _read_span(file: Path, columns: list[str], rows: range) -> pa.Table:
    """These rows, from the row groups that hold them."""
    with pq.ParquetFile(file) as parquet:
        groups, first, start = [], 0, 0
        for group in range(parquet.num_row_groups):
            end = start + parquet.metadata.row_group(group).num_rows
            if start < rows.stop and end > rows.start:
                first = first if groups else start
                groups.append(group)
            start = end
        table = parquet.read_row_groups(groups, columns)
    return table.slice(rows.start - first, len(rows))


def _dataset_of(table: pa.Table) -> Dataset:
    # Straight into memory: `Dataset.from_parquet` would write a copy to the cache folder.
    try:
        return Dataset(InMemoryTable(table))
    except ValueError:  # it says that it has features which this version of `datasets` has not
        return Dataset(InMemoryTable(table.replace_schema_metadata(None)))


def _list(files: Sequence[Path], most: int = 8) -> str:
    names = ", ".join(map(str, files[:most]))
    return names + (f" and {len(files) - most} more" if len(files) > most else "")


# --- objects ------------------------------------------------------------------------------------


def rows_of(data: Any, known: Sequence[str]) -> Rows:
    """Rows of whatever holds them in memory.

    Args:
        data: a `datasets.Dataset` or `IterableDataset`; an Arrow table, a pandas or polars frame,
            or anything else that speaks Arrow; a dict of columns; dicts in a list, a generator, or
            behind `__len__` and `__getitem__` as Torch's data sets have them.
        known: columns that a dict of columns may have: one with others may be a dict of splits.

    Raises:
        QAdapterError: none of these; several splits of which one must be chosen.
    """
    name = "the dataset"
    if isinstance(data, Dataset):
        return ArrowRows(data)
    if isinstance(data, IterableDataset):
        return _stream_rows(data, known, name)
    if isinstance(data, str | os.PathLike):
        raise QAdapterError(f"the dataset is a name, {str(data)!r}: load_preferences reads it")
    if isinstance(data, Mapping):
        return _rows_of_columns(data, known, name)
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        return _rows_of_frame(data, name)
    if hasattr(data, "__arrow_c_stream__"):
        return _rows_of_arrow(data, name)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        # Not by iterating: a map-style data set need not end that with an IndexError.
        return ListRows((data[index] for index in range(len(data))), name)
    if isinstance(data, Iterable):
        return ListRows(data, name)
    hint = ": call it" if callable(data) else ""
    raise QAdapterError(
        f"the dataset is a {type(data).__name__}, not rows{hint}; give a datasets.Dataset, a list "
        "of dicts, a dict of columns or a frame"
    )


def _stream_rows(data: IterableDataset, known: Sequence[str], name: str) -> ListRows:
    if data.features is None:
        return ListRows(data, name)
    wanted = [column for column in data.features if column in known]
    _refuse_media(data.features, {column: column for column in wanted}, name)
    # The other columns are left out, unless they are text, which tells what is in the rows.
    plain = [c for c in data.features if c in wanted or _media(data.features[c]) is None]
    return ListRows(data.select_columns(plain), name)


def _rows_of_columns(data: Mapping[str, Any], known: Sequence[str], name: str) -> ListRows:
    if not data:
        return ListRows([], name)
    if not set(data) & set(known) and not any(_is_column(column) for column in data.values()):
        splits = ", ".join(map(str, data))
        raise QAdapterError(f"{name} has the splits {splits}; choose one of them")
    lengths = {}
    for key, column in data.items():
        if isinstance(column, str | Mapping) or not hasattr(column, "__len__"):
            raise QAdapterError(
                f"{name} is a dict whose {key!r} is a {type(column).__name__}: it must map columns "
                "to lists; one row alone goes into a list"
            )
        lengths[key] = len(column)
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise QAdapterError(f"{name} has columns of different lengths: {sizes}")
    columns = {key: list(column) for key, column in data.items()}
    return ListRows(
        (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)),
        name,
    )


def _is_column(values: Any) -> bool:
    """Whether these are cells; a split's are rows, which are dicts."""
    if isinstance(values, Dataset | IterableDataset) or hasattr(values, "columns"):
        return False
    return not (isinstance(values, list) and values and all(isinstance(v, Mapping) for v in values))


def _rows_of_frame(data: Any, name: str) -> Rows:
    """A pandas frame. Arrow can't hold all that its cells may be."""
    try:
        return ArrowRows(_dataset_of(pa.Table.from_pandas(data, preserve_index=False)))
    except (pa.ArrowException, ValueError, TypeError):
        cells = data.astype(object)
        return ListRows(cells.where(cells.notna(), None).to_dict("records"), name)


def _rows_of_arrow(data: Any, name: str) -> Rows:
    try:
        return ArrowRows(_dataset_of(pa.table(data)))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise QAdapterError(f"{name} cannot be read through Arrow: {error}") from error
