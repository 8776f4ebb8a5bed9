"""Rows under their canonical names, whatever holds them in memory: lists, Arrow, frames, maps."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa
from datasets import Dataset, IterableDataset

from qadapter.data.arrow import Again, ArrowRows, Row, media_of, refuse_media
from qadapter.errors import QAdapterError


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
        return Again(lambda: (
            {new: plain(row[old]) for new, old in names.items() if old in row}
            for row in self.rows
        ))


def plain(value: Any) -> Any:
    """Lists, dicts and Python's own scalars; a float that is no number stands for nothing."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and value != value:
        return None
    return value


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
        return ListRows(without_media(data, known, name), name)
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


def without_media(data: IterableDataset, known: Sequence[str], name: str) -> IterableDataset:
    """A stream without the columns that are of no use; raises QAdapterError where one of ``known``
    holds images, sounds or the like."""
    if data.features is None:
        return data
    wanted = [column for column in data.features if column in known]
    for column in wanted:
        if media := media_of(data.features[column]):
            refuse_media(name, column, media)
    # The other columns are left out, unless they are text, which tells what is in the rows.
    return data.select_columns(
        [c for c in data.features if c in wanted or media_of(data.features[c]) is None]
    )


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
        return ArrowRows(pa.Table.from_pandas(data, preserve_index=False))
    except (pa.ArrowException, ValueError, TypeError):
        cells = data.astype(object)
        return ListRows(cells.where(cells.notna(), None).to_dict("records"), name)


def _rows_of_arrow(data: Any, name: str) -> Rows:
    try:
        return ArrowRows(pa.table(data))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise QAdapterError(f"{name} cannot be read through Arrow: {error}") from error
