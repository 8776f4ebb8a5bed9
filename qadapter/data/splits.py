"""Splits that never show a held-out prompt in training."""

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from datasets import Dataset

from qadapter.data.columns import pieces
from qadapter.errors import QAdapterError

Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int | None) -> list[Item]:
    """So many of the items, from all along them; all for None, and where there are no more."""
    count = len(items) if count is None else min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def split_by_prompt(
    dataset: Dataset, held_out: float | int | Sequence[float | int], seed: int = 0
) -> tuple[Dataset, ...]:
    """Split pairs into training and held-out parts that share no prompt.

    Args:
        dataset: pairs with a `prompt_id`, canonical or tokenized.
        held_out: size of the held-out part in prompts (not pairs): a fraction below 1 or a count. A
            sequence gives several held-out parts, e.g. ``(0.1, 0.1)`` for validation and test.
        seed: which prompts; the same on every machine and whatever the order of the pairs.

    Returns:
        ``(train, held_out, ...)``, the pairs of each in their original order.

    Raises:
        QAdapterError: a size out of range, or a part that would be empty.
    """
    sizes = list(held_out) if isinstance(held_out, Sequence) else [held_out]
    # Of each pair the number of its prompt among all prompts, which are sorted.
    prompts, prompt_of = np.unique(_prompt_ids(dataset), return_inverse=True)
    counts = [_count(size, len(prompts)) for size in sizes]
    if sum(counts) >= len(prompts):
        raise QAdapterError(
            f"cannot hold out {sum(counts)} of {len(prompts)} prompts: none is left for training"
        )
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    part_of = np.zeros(len(prompts), dtype=np.int64)
    start = 0
    for part, count in enumerate(counts, 1):
        part_of[order[start : start + count]] = part
        start += count
    parts = part_of[prompt_of]
    return tuple(
        dataset.select(np.flatnonzero(parts == part)) for part in range(len(counts) + 1)
    )


def without_prompts(dataset: Dataset, prompt_ids: Iterable[str]) -> Dataset:
    """The pairs whose `prompt_id` is none of these; they may be none."""
    found = _prompt_ids(dataset)
    excluded = np.unique(np.asarray([*prompt_ids], dtype=object).astype(str))
    return dataset.select(np.flatnonzero(~np.isin(found, excluded)))


def _prompt_ids(dataset: Dataset) -> np.ndarray:
    """Of each pair; arrays of text take a fraction of what as many strings do."""
    parts = [x.to_numpy(zero_copy_only=False).astype(str) for x in pieces(dataset, "prompt_id")]
    return np.concatenate([np.zeros(0, "U1"), *parts])


def _count(size: float | int, total: int) -> int:
    # "not above 0" and not "at most 0": NaN is neither.
    if isinstance(size, bool) or not size > 0 or (isinstance(size, float) and size >= 1):
        raise QAdapterError(
            f"held-out size {size!r} must be a fraction between 0 and 1 or a count of prompts"
        )
    return size if isinstance(size, int) else max(1, round(size * total))
