"""Reading preference data: JSON, JSON Lines, Parquet, folders of them, or a hub dataset."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import ReadInstruction, load_dataset
from datasets import config as datasets_config
from huggingface_hub import HfApi, constants

from qadapter.data.arrow import ArrowRows, ParquetRows
from qadapter.data.json_rows import read_json_files
from qadapter.data.rows import Rows
from qadapter.data.saved import read_saved
from qadapter.data.split_files import choose_files, files_of_readme
from qadapter.errors import QAdapterError, beginning, listed

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
# Files that `datasets` and the hub keep beside the data.
_NOT_DATA = {
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
}
_HUB_TIMEOUT_SECONDS = 10.0


def read_rows(
    dataset_name: str | Path, *, config: str | None, split: str, limit: int | None
) -> Rows:
    """Rows of a local file, a local folder or a hub dataset, in source order.

    Raises:
        QAdapterError: nothing by that name here or on the hub, no such split, nothing in it, or a
            file that is not what its name says (with file and line).
    """
    name = os.fspath(dataset_name)
    if (path := local_path(name)) is not None:
        rows = _read_slice(
            lambda name, limit: _read_local(path, config, name, limit), split, limit
        )
        if not len(rows):
            raise QAdapterError(f"{path} holds no rows" + (f" in {split!r}" * path.is_dir()))
        return rows
    dataset = load_from_hub(name, config, split)
    if not len(dataset):
        raise QAdapterError(f"hub dataset {name} holds no rows in {split!r}")
    return _first(ArrowRows(dataset, name), limit)


def local_path(name: str) -> Path | None:
    """The file or folder of this name, or None where it can be the hub's.

    Raises:
        QAdapterError: neither.
    """
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise QAdapterError(f"{path} cannot be read: {error.strerror}") from error
    if not exists and not _may_be_hub_name(name):
        raise QAdapterError(f"no file or folder {path}")
    return path if exists else None


def _first(rows: Rows, limit: int | None) -> Rows:
    return rows if limit is None or limit >= len(rows) else rows.part(0, limit)


def _read_slice(
    read: Callable[[str, int | None], Rows], split: str, limit: int | None
) -> Rows:
    """A split, or of "train[:100]" and "train[10%:20%]" that part, as `datasets` counts it."""
    name, bracket, _ = split.partition("[")
    if not bracket and "+" not in split:
        return read(split, limit)
    way_out = "local data takes one split, or a slice of one ('train[:100]', 'train[:10%]')"
    if "+" in split:
        raise QAdapterError(f"split {split!r}: {way_out}")
    rows = read(name, None)
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError) as error:
        raise QAdapterError(f"split {split!r} can't be read ({error}): {way_out}") from error
    start, stop = (0 if part.from_ is None else part.from_), part.to
    return _first(rows.part(start, len(rows) if stop is None else stop), limit)


def local_files(path: Path, config: str | None, split: str) -> list[Path] | None:
    """The files of a split of a local file or folder; None where ``save_to_disk`` wrote it.

    Raises:
        QAdapterError: no such split, nothing in it, or a config that nothing here has.
    """
    if not path.is_dir():
        if config is not None:
            raise QAdapterError(
                f"config {config!r} names a part of a hub dataset, but {path} is a local path"
            )
        if split != "train":
            raise QAdapterError(
                f"{path} is a single file and has no split {split!r}; name the file that holds it, "
                "or leave the split at 'train'"
            )
        return [path]
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if not saved and (named := files_of_readme(path, config, split)) is not None:
        return named
    if config is not None:
        raise QAdapterError(
            f"config {config!r} names a part of a hub dataset, but {path} is a local path without "
            "a README.md that lists configurations"
        )
    if saved:
        return None
    files = sorted(file for file in path.rglob("*") if _is_data(file, path))
    if not files:
        raise QAdapterError(f"folder {path} holds no {', '.join(SUFFIXES)} file")
    return choose_files(path, files, split, SUFFIXES)


def _read_local(path: Path, config: str | None, split: str, limit: int | None) -> Rows:
    files = local_files(path, config, split)
    if files is None:
        return _first(read_saved(path, split), limit)
    if are_parquet(files):
        return _first(ParquetRows(files), limit)
    return read_json_files(files, limit)


def _is_data(file: Path, folder: Path) -> bool:
    # Programs hide their own files (.cache, ._train.jsonl, __MACOSX) beside the data.
    hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    return (
        not hidden and file.name.endswith(SUFFIXES) and file.name not in _NOT_DATA
        and file.is_file()
    )


def are_parquet(files: list[Path]) -> bool:
    """Whether they are Parquet; raises QAdapterError where they are neither that nor JSON."""
    parquet = [file.name.endswith(".parquet") for file in files]
    if any(parquet) and not all(parquet):
        raise QAdapterError(
            f"{files[0].parent} mixes JSON and Parquet files; name one of {listed(files)}"
        )
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise QAdapterError(f"{file}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    return all(parquet)


def _may_be_hub_name(name: str) -> bool:
    """`name` or `owner/name` that does not look like a path or a data file."""
    return (
        bool(name)
        and not name.startswith((".", "/", "~"))
        and not name.endswith(SUFFIXES)
        and name.count("/") <= 1
        and os.sep not in name.replace("/", "")
    )


def load_from_hub(name: str, config: str | None, split: str, streaming: bool = False) -> Any:
    """A `Dataset`, or an `IterableDataset` that is read as it is asked for; raises QAdapterError
    where there is none."""
    try:
        _check_reachable(name)
        options = {"streaming": True} if streaming else {}
        return load_dataset(name, config, split=split, **options)
    except Exception as error:
        # `datasets` and the hub client raise a dozen unrelated classes here (their own, OSError,
        # ValueError for splits and configs, HTTP errors); the cause stays attached for debugging.
        reason = beginning(error) or type(error).__name__
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
