"""Reading preference data: JSON, JSON Lines, Parquet, folders of them, or a hub dataset."""

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets import config as datasets_config
from datasets.table import InMemoryTable
from huggingface_hub import HfApi, constants

from qadapter.errors import QAdapterError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
# Files that `datasets` and the hub keep beside the data.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB_TIMEOUT_SECONDS = 10.0

Row = Mapping[str, Any]


class ArrowRows:
    """Rows of an Arrow-backed dataset, without the nulls Arrow fills into keys a row never had.

    In Arrow every message of a column has every key of every other message; a template that asks
    whether `message.tool_calls` is defined must not find those. Top-level nulls stay.
    """

    def __init__(self, dataset: Dataset, limit: int | None = None) -> None:
        self.dataset = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Row]:
        for row in self.dataset.with_format(None):
            yield {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def read_rows(
    dataset_name: str | Path, *, config: str | None, split: str, limit: int | None
) -> list[Row] | ArrowRows:
    """Rows of a local file, a local folder or a hub dataset, in source order.

    Raises:
        QAdapterError: nothing by that name here or on the hub, no such split, nothing in it, or a
            file that is not what its name says (with file and line).
    """
    name = os.fspath(dataset_name)
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise QAdapterError(f"{path} cannot be read: {error.strerror}") from error
    if exists:
        if config is not None:
            raise QAdapterError(
                f"config {config!r} names a part of a hub dataset, but {path} is a local path"
            )
        rows = _read_folder(path, split, limit) if path.is_dir() else _read_file(path, split, limit)
        if not len(rows):
            raise QAdapterError(f"{path} holds no rows" + (f" in {split!r}" * path.is_dir()))
        return rows
    if not _may_be_hub_name(name):
        raise QAdapterError(f"no file or folder {path}")
    dataset = _load_from_hub(name, config, split)
    if not len(dataset):
        raise QAdapterError(f"hub dataset {name} holds no rows in {split!r}")
    return ArrowRows(dataset, limit)


def _read_file(path: Path, split: str, limit: int | None) -> list[Row] | ArrowRows:
    if split != "train":
        raise QAdapterError(
            f"{path} is a single file and has no split {split!r}; name the file that holds it, "
            "or leave the split at 'train'"
        )
    return _read_files([path], limit)


def _read_folder(path: Path, split: str, limit: int | None) -> list[Row] | ArrowRows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = _load_saved(path)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise QAdapterError(f"{path} has no split {split!r}; it has {_list(dataset)}")
            dataset = dataset[split]
        elif split != "train":
            raise QAdapterError(f"{path} is one saved dataset and has no split {split!r}")
        return ArrowRows(dataset, limit)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.name.endswith(SUFFIXES) and file.name not in _NOT_DATA
    )
    if not files:
        raise QAdapterError(f"folder {path} holds no {', '.join(SUFFIXES)} file")
    wanted = [file for file in files if split in _split_words(file.relative_to(path))]
    if not wanted:
        if split != "train" or any(
            _split_words(file.relative_to(path)) & set(SPLIT_NAMES) for file in files
        ):
            seen = _list(str(file.relative_to(path)) for file in files)
            raise QAdapterError(
                f"folder {path} has no file named for split {split!r}; it has {seen}"
            )
        wanted = files
    return _read_files(wanted, limit)


def _split_words(file: Path) -> set[str]:
    """Words that may name a split: parent folders, and the file name up to its first - _ or dot."""
    stem = file.name.replace("_", "-").replace(".", "-").split("-")[0]
    return {stem, *file.parts[:-1]}


def _read_files(files: list[Path], limit: int | None) -> list[Row] | ArrowRows:
    parquet = [file.name.endswith(".parquet") for file in files]
    if all(parquet):
        return ArrowRows(_read_parquet(files), limit)
    if any(parquet):
        raise QAdapterError(
            f"{files[0].parent} mixes JSON and Parquet files; name one of {_list(map(str, files))}"
        )
    rows: list[Row] = []
    for file in files:
        rows += _read_json(file, None if limit is None else limit - len(rows))
    return rows


def _read_parquet(files: list[Path]) -> Dataset:
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowInvalid, OSError) as error:
            raise QAdapterError(f"{file} cannot be read as Parquet: {error}") from error
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowInvalid as error:
        names = _list(map(str, files))
        raise QAdapterError(f"{names} do not have the same columns: {error}") from error
    # Straight into memory: `Dataset.from_parquet` would write a copy to the cache folder.
    return Dataset(InMemoryTable(table))


def _read_json(file: Path, limit: int | None) -> list[Row]:
    """A JSON list of objects, or one object a line; told apart by the first character."""
    if not file.name.endswith(SUFFIXES):
        raise QAdapterError(f"{file}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rb") as stream:
            data = stream.read().removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError) as error:
        raise QAdapterError(f"{file} cannot be read: {error}") from error
    if data.lstrip()[:1] == b"[":
        rows = _parse(data, file, 1)
        for index, row in enumerate(rows[:limit]):
            if not isinstance(row, dict):
                raise QAdapterError(f"{file}: row {index} is a {type(row).__name__}, not an object")
        return rows[:limit]
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if limit is not None and len(rows) >= limit:
            break
        if not line.strip():
            continue
        try:
            row = _parse(line, file, number)
        except QAdapterError:
            if not rows:
                _refuse_single_object(data, file)
            raise
        if not isinstance(row, dict):
            raise QAdapterError(f"{file}:{number} holds a {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def _parse(data: bytes, file: Path, line: int) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise QAdapterError(f"{file}:{line} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        where = f"{file}:{line}"
        raise QAdapterError(f"{where} is not JSON: {error.msg} (column {error.colno})") from error


def _refuse_single_object(data: bytes, file: Path) -> None:
    """Raise when the file is one object over several lines, which reads as bad JSON Lines."""
    try:
        value = json.loads(data)
    except ValueError:
        return
    keys = f" with the keys {_list(value)}" if isinstance(value, dict) else ""
    raise QAdapterError(
        f"{file} holds one JSON {type(value).__name__}{keys}; rows must be a JSON list of objects, "
        "or one object a line"
    )


def _load_saved(path: Path) -> Dataset | DatasetDict:
    try:
        return load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise QAdapterError(f"{path} cannot be read as a saved dataset: {error}") from error


def _may_be_hub_name(name: str) -> bool:
    """`name` or `owner/name` that does not look like a path or a data file."""
    return (
        bool(name)
        and not name.startswith((".", "/", "~"))
        and not name.endswith(SUFFIXES)
        and name.count("/") <= 1
        and os.sep not in name.replace("/", "")
    )


def _load_from_hub(name: str, config: str | None, split: str) -> Dataset:
    try:
        _check_reachable(name)
        return load_dataset(name, config, split=split)
    except Exception as error:
        # `datasets` and the hub client raise a dozen unrelated classes here (their own, OSError,
        # ValueError for splits and configs, HTTP errors); the cause stays attached for debugging.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise QAdapterError(
            f"no file or folder {name!r}, and the hub dataset {name!r} cannot be loaded: {reason}"
        ) from error


def _check_reachable(name: str) -> None:
    """Fail in seconds where `load_dataset` would retry for half a minute or more.

    Skipped in offline mode and for a dataset in the cache, which `load_dataset` falls back to.
    """
    cached = Path(datasets_config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if not constants.HF_HUB_OFFLINE and not cached.exists():
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_SECONDS)


def _list(names: Any, most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
