"""A name for a tokenized dataset, for caches of what a frozen base computes on it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
_BATCH = 4096


def fingerprint(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    base: str | Mapping[str, Any],
    max_length: int | None,
) -> str:
    """A hash (32 hex digits) of token ids and their order, tokenizer, base model and length.

    The same in every process and on every machine; it changes when a token, the order of the pairs,
    the vocabulary, the chat template, `base` or `max_length` does.

    Args:
        dataset: what `tokenize_preferences` made.
        tokenizer: its tokenizer.
        base: what identifies the frozen base: a name, or JSON values such as name, revision, hash.
        max_length: the limit the pairs were prepared with.
    """
    whole = hashlib.sha256()
    settings = {
        "base": base if isinstance(base, str) else dict(base),
        "max_length": max_length,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "chat_template": tokenizer.chat_template,
        "columns": [name for name in _COLUMNS if name in dataset.column_names],
    }
    whole.update(json.dumps(settings, sort_keys=True).encode())
    for name in settings["columns"]:
        whole.update(_hash_lists(dataset, name))
    return whole.hexdigest()[:32]


def digest(dataset: Dataset) -> str:
    """A hash (64 hex digits) of token ids, masks and their order alone."""
    whole = hashlib.sha256()
    for name in _COLUMNS:
        if name in dataset.column_names:
            whole.update(name.encode() + _hash_lists(dataset, name))
    return whole.hexdigest()


def _hash_lists(dataset: Dataset, name: str) -> bytes:
    """Digest of a column of lists, independent of how Arrow has it in chunks."""
    lengths, values = hashlib.sha256(), hashlib.sha256()
    for batch in dataset.select_columns([name]).with_format("arrow").iter(_BATCH):
        column = batch[name]
        lengths.update(column.combine_chunks().value_lengths().to_numpy().astype("<i8").tobytes())
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        values.update(flat.astype(np.dtype("<i8")).tobytes())
    return lengths.digest() + values.digest()
