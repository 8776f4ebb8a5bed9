"""What the files of a folder hold: a list of sizes and digests, written when all of them are.

A folder without one was never finished; a file that isn't what its entry says was cut, damaged,
taken from elsewhere or edited. Digests are of content alone, so folders can be copied and renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from qadapter.errors import QAdapterError, shown
from qadapter.system.documents import read_json
from qadapter.system.hashing import file_sha256
from qadapter.system.scratch import replacing

MANIFEST_NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file holds."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Entry:
        """Raises OSError where the file can't be read."""
        return cls(path.stat().st_size, file_sha256(path))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Name of a file, relative to the folder and with ``/`` → what it holds."""

    files: dict[str, Entry]

    def check(self, folder: str | Path, names: Iterable[str] | None = None) -> None:
        """
        Args:
            names: the files that are going to be read; default: all that are listed.

        Raises:
            QAdapterError: one isn't listed, is missing, or isn't what was written; names it.
        """
        for name in self.files if names is None else names:
            self.check_file(name, Path(folder) / name)

    def check_file(self, name: str, path: Path) -> None:
        """Hold one file, wherever it is, against its entry; raises as ``check``."""
        if name not in self.files:
            raise QAdapterError(f"{path} is not listed in {MANIFEST_NAME}")
        expected = self.files[name]
        try:
            size = path.stat().st_size
            if not path.is_file():  # a device, or a pipe, would be read without end
                raise QAdapterError(f"{path} is no file, but {MANIFEST_NAME} lists it")
            found = Entry(size, file_sha256(path) if size == expected.bytes else "")
        except OSError as error:
            raise QAdapterError(
                f"{path}: {error.strerror}, but {MANIFEST_NAME} lists it"
            ) from error
        if found != expected:
            how = (
                f"{size} bytes, not {expected.bytes}" if size != expected.bytes
                else f"SHA-256 {found.sha256[:12]}…, not {expected.sha256[:12]}…"
            )
            raise QAdapterError(
                f"{path} is not what was saved ({how}): copy the folder again; if you changed the "
                f"file yourself, give its entry in {MANIFEST_NAME} the new values"
            )


def write(folder: str | Path, names: Iterable[str]) -> None:
    """List files that are all written; replaces an earlier list whole.

    Raises:
        OSError: a file can't be read, or the folder can't be written.
    """
    folder = Path(folder)
    entries = {name: Entry.of(folder / name) for name in sorted(names)}
    with replacing(folder / MANIFEST_NAME, "saving") as listed, open(
        listed, "w", encoding="utf-8"
    ) as file:
        file.write(_text(entries))
        file.flush()
        os.fsync(file.fileno())


def text(contents: Mapping[str, bytes], names: Iterable[str]) -> bytes:
    """What ``write`` would write of files that are not on a disk."""
    return _text({
        name: Entry(len(contents[name]), hashlib.sha256(contents[name]).hexdigest())
        for name in sorted(names)
    }).encode()


def _text(entries: Mapping[str, Entry]) -> str:
    files = {name: dataclasses.asdict(entry) for name, entry in entries.items()}
    return json.dumps({"files": files}, indent=1) + "\n"


def remove(folder: str | Path) -> None:
    """From here on the folder doesn't count as whole: call before a file in it is replaced."""
    (Path(folder) / MANIFEST_NAME).unlink(missing_ok=True)


def read(path: str | Path) -> Manifest:
    """
    Args:
        path: of the manifest itself.

    Raises:
        QAdapterError: missing, or no manifest.
    """
    found = read_json(path)
    try:
        files = {name: Entry(**fields) for name, fields in found["files"].items()}
        if not all(type(e.bytes) is int and type(e.sha256) is str for e in files.values()):
            raise ValueError("sizes and digests are missing")
        if outside := [name for name in files if not _is_inside(name)]:
            raise ValueError(f"{shown(outside[0])} is no file of this folder")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise QAdapterError(f"{path} is damaged, or no list of files: {error}") from error
    return Manifest(files)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = str(path) == name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts
