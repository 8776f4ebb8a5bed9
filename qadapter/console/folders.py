"""Output folders: an earlier run is never written over unless that was asked for."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from qadapter import storage
from qadapter.errors import QAdapterError

RUN_FILES = (
    storage.WEIGHTS_NAME, storage.CONFIG_NAME, "summary.json", "metrics.jsonl", "report.md",
    "training_args.json", "checkpoint-*",
)
EVALUATION_FILES = ("eval.json", "pairs.jsonl", "report.md", "calibration.png")


def check_output_dir(
    folder: str | Path, files: Sequence[str], may_exist: bool, way_out: str
) -> Path:
    """The folder as a path, if it can be written to and holds none of ``files`` (patterns).

    Args:
        may_exist: an earlier run there is fine.
        way_out: what the user can do instead, for the message.

    Raises:
        QAdapterError: a file, not writable, or it holds another run.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise QAdapterError(f"output_dir {folder} is a file")
    held = [path.name for pattern in files for path in sorted(folder.glob(pattern))]
    if held and not may_exist:
        raise QAdapterError(f"output_dir {folder} holds another run ({held[0]}): {way_out}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QAdapterError(f"output_dir {folder} can't be made: {error.strerror}") from error
    return folder


@contextlib.contextmanager
def telling_full_disk(where: str | Path) -> Iterator[None]:
    """Turns "no space left", however a library puts it, into an error that names the place."""
    try:
        yield
    except Exception as error:
        if isinstance(error, QAdapterError) or not _means_full(error):
            raise
        raise QAdapterError(
            f"{where}: no space left on the device; what was written before is kept"
        ) from error


def _means_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Libraries written in Rust (tokenizers, safetensors) have only a text for it.
    return f"os error {errno.ENOSPC}" in str(error)


def remove_files(folder: Path, files: Sequence[str]) -> None:
    """Remove an earlier run's files, and nothing else."""
    for pattern in files:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
