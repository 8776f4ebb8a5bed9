"""Pairs that people chose, appended to a file that ``qadapter train`` reads."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from qadapter.data import as_preferences
from qadapter.errors import QAdapterError
from qadapter.system.documents import parse_json


class PreferenceFile:
    """A JSON Lines file that rows are added to, also by several servers at once.

    Args:
        path: made where it is missing; its folder must be there.

    Raises:
        QAdapterError: it can't be written, or holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if self.path.suffix != ".jsonl":
            raise QAdapterError(f"preferences_file {path} must end in .jsonl, as train reads it")
        try:
            with open(self.path, "ab+") as file:
                file.seek(0)
                first = file.readline(2**20)
        except OSError as error:
            raise QAdapterError(f"{path} can't be written: {error.strerror}") from error
        if first.strip():
            found = parse_json(first.decode(errors="replace"), f"{path}:1")
            if not (isinstance(found, dict) and {"chosen", "rejected"} <= found.keys()):
                raise QAdapterError(
                    f"{path}:1 is no preference pair: choose another preferences_file"
                )

    def append(self, prompt: list[Any], chosen: str, rejected: str) -> dict[str, Any]:
        """One more pair, on disk when this returns.

        Returns:
            The row.

        Raises:
            QAdapterError: a pair that training would leave out; says why.
            OSError: it can't be written; the file is then as it was.
        """
        row = {"prompt": prompt} | {
            name: [{"role": "assistant", "content": text}]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        }
        problem = as_preferences([row])[0]["problem"]
        if problem is not None:
            raise QAdapterError(f"training would leave this pair out: {problem}")
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # whoever wrote the last line left it open
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        return row
