"""Output folders: an earlier run is never written over unless that was asked for."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets

from qadapter.console.signals import Terminated
from qadapter.errors import QAdapterError
from qadapter.policy.adapter_files import CONFIG_NAME, PEFT_CONFIG_NAME, WEIGHTS_NAME
from qadapter.system.caches import cache_dir
from qadapter.system.locking import sole_run
from qadapter.system.manifest import MANIFEST_NAME
from qadapter.system.room import free_disk, require_writable

RUN_FILES = (
    WEIGHTS_NAME, CONFIG_NAME, PEFT_CONFIG_NAME, MANIFEST_NAME,
    "summary.json", "metrics.jsonl", "report.md", "report.html",
    "completions.jsonl", "training_args.json",
    # With a number alone: checkpoint-4-backup is the user's.
    *(f"checkpoint-{'[0-9]' * digits}" for digits in range(1, 10)),
)
EVALUATION_NAME = "eval.json"
EVALUATION_FILES = (EVALUATION_NAME, "pairs.jsonl", "report.md", "calibration.png")


@contextlib.contextmanager
def output_folder(
    folder: str | Path, files: Sequence[str], may_exist: bool, way_out: str, *,
    inputs: Mapping[str, str | None] | None = None, known_by: str | None = None,
) -> Iterator[Path]:
    """The folder, looked at as ``check_output_dir`` does; inside, no other run writes to it.

    Raises:
        QAdapterError: as ``check_output_dir``; another run writes to it, whose process is named.
    """
    folder = Path(folder).expanduser()
    with contextlib.ExitStack() as stack:
        try:
            if folder.is_dir():  # what another run is just writing there is no earlier run's
                stack.enter_context(sole_run(folder))
            check_output_dir(folder, files, may_exist, way_out, inputs=inputs, known_by=known_by)
            stack.enter_context(sole_run(folder))
        except OSError as error:
            raise _cannot_write(folder, error) from error
        yield folder


def check_output_dir(
    folder: str | Path, files: Sequence[str], may_exist: bool, way_out: str, *,
    inputs: Mapping[str, str | None] | None = None, known_by: str | None = None,
) -> Path:
    """The folder as a path, if it can be written to and holds none of ``files`` (patterns).

    Args:
        may_exist: an earlier run there is fine.
        way_out: what the user can do instead, for the message.
        inputs: option → what is read from there (a file, a folder, or no local path at all), and
            must outlive the run whatever ``may_exist`` says.
        known_by: the file without which ``files`` are the user's own, not an earlier run's.

    Raises:
        QAdapterError: a file, not writable, it holds another run, or an input would be lost.
    """
    folder = Path(folder).expanduser()
    if os.path.lexists(folder) and not folder.is_dir():
        raise QAdapterError(f"output_dir {folder} is a file, or a link to none")
    held = [path for pattern in files for path in sorted(folder.glob(pattern))]
    for option, name in (inputs or {}).items():
        if name is not None and _would_be_lost(Path(name).expanduser(), folder, held):
            raise QAdapterError(
                f"output_dir {folder}: {option} {name} would be written over: choose another folder"
            )
    if held and known_by is not None and not (folder / known_by).exists():
        raise QAdapterError(
            f"output_dir {folder} holds a {held[0].name} of something else ({known_by} is not "
            "beside it): choose another folder"
        )
    if held and not may_exist:
        raise QAdapterError(f"output_dir {folder} holds another run ({held[0].name}): {way_out}")
    try:
        require_writable(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder


def check_output_file(
    file: str | Path, *, replaces: str | None = None, way_out: str = "choose another"
) -> Path:
    """The one file that a command writes as a path, if it can be written.

    Args:
        replaces: how a file begins that may be written over; None: none may. It is the content
            that tells: an input stays what it is under whatever name or link it is given.
        way_out: what the user can do instead, for the message.

    Raises:
        QAdapterError: a folder, not writable, or another file is there.
    """
    path = Path(file).expanduser()
    try:
        if path.is_dir():
            raise QAdapterError(f"output_file {path} is a folder")
        if path.exists():
            if replaces is None:
                raise QAdapterError(
                    f"output_file {path} exists; it is not written over: {way_out}"
                )
            if not path.is_file() or not _begins(path, replaces.encode()):
                raise QAdapterError(
                    f"output_file {path} is another file than this command writes; it is not "
                    f"written over: {way_out}"
                )
        require_writable(path.parent)
    except OSError as error:
        raise QAdapterError(
            f"output_file {path} can't be written: {error.strerror}"
        ) from error
    return path


def _begins(path: Path, text: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(text)) == text


def _cannot_write(folder: Path, error: OSError) -> QAdapterError:
    return QAdapterError(f"output_dir {folder} can't be written to: {error.strerror}")


def _would_be_lost(read: Path, folder: Path, held: Sequence[Path]) -> bool:
    """Whether what is read is the folder itself, or in what a run there replaces."""
    if not read.exists():  # a hub name
        return False
    # resolve() raises on a link to itself.
    read, folder = Path(os.path.realpath(read)), Path(os.path.realpath(folder))
    replaced = [Path(os.path.realpath(path)) for path in held]
    return read == folder or any(p == read or p in read.parents for p in replaced)


@contextlib.contextmanager
def telling_how_to_go_on(where: str | Path, how: str | Callable[[], str]) -> Iterator[None]:
    """Around work whose results go to a file or folder: turns "no space left", however a library
    puts it, into an error that names the disk, and says of it and of ``Terminated`` how the work
    goes on later.

    Args:
        how: such as "run it again"; or what tells it then.
    """
    def said() -> str:
        return how if isinstance(how, str) else how()

    try:
        yield
    except Terminated as stop:
        if stop.args:
            raise
        raise Terminated(said()) from None
    except Exception as error:
        if isinstance(error, QAdapterError) or not _means_full(error):
            raise
        raise QAdapterError(
            f"{_full_place(error, Path(where).expanduser())}: no space left on the device: free "
            f"some; {said()}"
        ) from error


def _means_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Libraries written in Rust (tokenizers, safetensors) have only a text for it.
    return f"os error {errno.ENOSPC}" in str(error)


def _full_place(error: Exception, where: Path) -> Path:
    """The folder that could not be written to: as the error names it, or else the one with the
    least room of those that are written to besides."""
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if isinstance(named, str):
        file = Path(named).absolute()
        return where if where.absolute() in file.parents else file.parent
    places = [where, cache_dir(), Path(datasets.config.HF_CACHE_HOME), Path(tempfile.gettempdir())]
    return min(places, key=_room)


def _room(place: Path) -> int:
    try:
        return free_disk(place)
    except OSError:
        return 1 << 62


def remove_files(folder: Path, files: Sequence[str]) -> None:
    """Remove an earlier run's files, and nothing else."""
    for pattern in files:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
