"""Numbers of a dataset's columns, read piece by piece: a column may be larger than memory."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset

_BATCH = 4096


def pieces(dataset: Dataset, name: str) -> Iterator[pa.Array]:
    """A column's values, some thousands at a time."""
    for batch in dataset.select_columns([name]).with_format("arrow").iter(_BATCH):
        yield batch[name].combine_chunks()


def list_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """Of a column's lists, int64 [P]."""
    return _joined(x.value_lengths().to_numpy(zero_copy_only=False) for x in pieces(dataset, name))


def list_sums(dataset: Dataset, name: str) -> np.ndarray:
    """Of a column's lists of bools, how many of each are true, int64 [P]."""
    def sums() -> Iterator[np.ndarray]:
        for lists in pieces(dataset, name):
            true = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
            ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))
            totals = np.concatenate([[0], np.cumsum(true)])[np.concatenate([[0], ends])]
            yield np.diff(totals)

    return _joined(sums())


def _joined(parts: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(x.astype(np.int64) for x in parts)])
