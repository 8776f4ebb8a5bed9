"""Datasets that are made row by row, in memory while they are small, else in a file that Arrow maps
and that is gone when the process is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from qadapter.errors import QAdapterError
from qadapter.system.caches import cache_dir
from qadapter.system.scratch import process_folder

_CHUNK = 1_000
"""Rows turned into Arrow at a time, so that only a chunk is held as Python objects."""
_IN_MEMORY = 16 * 2**20
"""Bytes that a dataset may take in memory."""

logger = logging.getLogger(__name__)


class Spool:
    """Collects rows.

    Args:
        name: of what they become, for a line about it.
    """

    def __init__(self, features: Features, name: str) -> None:
        self.features, self.name = features, name
        self._rows: list[dict[str, Any]] = []
        self._chunks: list[Dataset] = []
        self._bytes = 0
        self._file: tuple[Path, ArrowWriter] | None = None
        self._no_file = False

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        """Raises QAdapterError where the disk that the rows go to is full."""
        self._rows.extend(rows)
        if len(self._rows) >= _CHUNK:
            self._chunk()

    def dataset(self) -> Dataset:
        """All rows; raises QAdapterError as ``extend``."""
        if self._rows or not (self._chunks or self._file):
            self._chunk()
        if self._file is None:
            return concatenate_datasets(self._chunks) if len(self._chunks) > 1 else self._chunks[0]
        path, writer = self._file
        with self._naming(path):
            writer.finalize()
            writer.close()
        return Dataset.from_file(str(path))

    def _chunk(self) -> None:
        chunk = Dataset.from_dict(
            {name: [row.get(name) for row in self._rows] for name in self.features},
            features=self.features,
        )
        self._rows.clear()
        self._chunks.append(chunk)
        self._bytes += chunk.data.nbytes
        if self._bytes > _IN_MEMORY and (file := self._open()) is not None:
            path, writer = file
            with self._naming(path):
                for chunk in self._chunks:
                    writer.write_table(chunk.data.table)
            self._chunks.clear()

    def _open(self) -> tuple[Path, ArrowWriter] | None:
        """The file for the rows; None where there is none."""
        if self._file is None and not self._no_file:
            try:
                folder = process_folder(cache_dir() / "pairs", "rows")
                path = folder / f"rows-{len(list(folder.iterdir())):04d}.arrow"
                self._file = path, ArrowWriter(path=str(path), features=self.features)
            except OSError as error:
                self._no_file = True
                logger.warning("%s stays in memory: %s", self.name, error)
        return self._file

    @contextlib.contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise QAdapterError(
                f"{self.name} takes more memory than it may and can't be kept at {path.parent} "
                f"({error}): free some space there, or set XDG_CACHE_HOME to another place"
            ) from error
