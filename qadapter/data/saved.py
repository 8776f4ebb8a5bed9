"""What `datasets` writes with `save_to_disk`, read as Arrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from qadapter.data.arrow import ArrowRows, limited
from qadapter.errors import QAdapterError, shown
from qadapter.system.documents import read_json


def read_saved(path: Path, split: str) -> ArrowRows:
    """Rows of a saved `Dataset`, or of one split of a saved `DatasetDict`.

    Raises:
        QAdapterError: no such split, or files that are not what they should be.
    """
    if (path / "dataset_dict.json").is_file():
        splits = _strings(path / "dataset_dict.json", "splits")
        if split not in splits:
            known = ", ".join(splits[:8])
            raise QAdapterError(f"{path} has no split {shown(split)}; it has {known}")
        path = _inside(path, split)
    elif split != "train":
        raise QAdapterError(f"{path} is one saved dataset and has no split {split!r}")
    names = _strings(path / "state.json", "_data_files", "filename")
    tables = [_read_table(_inside(path, name)) for name in names]
    try:
        return ArrowRows(pa.concat_tables(tables), str(path))
    except (pa.ArrowException, ValueError) as error:
        raise QAdapterError(f"{path}: its files do not fit each other: {error}") from error


def _strings(file: Path, key: str, inner: str | None = None) -> list[str]:
    """A list of names in a JSON file, or what each of its entries calls ``inner``."""
    found: Any = read_json(file)
    try:
        names = [name if inner is None else name[inner] for name in found[key]]
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("it names nothing")
    except (TypeError, LookupError) as error:
        raise QAdapterError(f"{file} is not a saved dataset's: it has no list {key!r}") from error
    return names


def _inside(folder: Path, name: str) -> Path:
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise QAdapterError(f"{folder}: {shown(name)} is not the name of a file in it")
    return folder / name


def _read_table(file: Path) -> pa.Table:
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
            table = pa.Table.from_batches(limited(reader, file), reader.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise QAdapterError(f"{file} can't be read as a saved dataset: {error}") from error
    return table
