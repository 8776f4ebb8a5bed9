"""Splits that never show a held-out prompt in training."""

import random
from collections.abc import Iterable, Sequence

from datasets import Dataset

from qadapter.errors import QAdapterError


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
    prompt_ids = dataset["prompt_id"][:] if len(dataset) else []
    prompts = sorted(set(prompt_ids))
    counts = [_count(size, len(prompts)) for size in sizes]
    if sum(counts) >= len(prompts):
        raise QAdapterError(
            f"cannot hold out {sum(counts)} of {len(prompts)} prompts: none is left for training"
        )
    random.Random(seed).shuffle(prompts)
    part_of: dict[str, int] = {}
    for part, count in enumerate(counts, 1):
        part_of.update(dict.fromkeys(prompts[len(part_of) : len(part_of) + count], part))
    indices: list[list[int]] = [[] for _ in range(len(counts) + 1)]
    for index, prompt_id in enumerate(prompt_ids):
        indices[part_of.get(prompt_id, 0)].append(index)
    return tuple(dataset.select(part) for part in indices)


def without_prompts(dataset: Dataset, prompt_ids: Iterable[str]) -> Dataset:
    """The pairs whose `prompt_id` is none of these; they may be none."""
    excluded = set(prompt_ids)
    return dataset.select(
        [i for i, prompt in enumerate(dataset["prompt_id"]) if prompt not in excluded]
    )


def _count(size: float | int, total: int) -> int:
    # "not above 0" and not "at most 0": NaN is neither.
    if isinstance(size, bool) or not size > 0 or (isinstance(size, float) and size >= 1):
        raise QAdapterError(
            f"held-out size {size!r} must be a fraction between 0 and 1 or a count of prompts"
        )
    return size if isinstance(size, int) else max(1, round(size * total))
