"""How long the pairs of a dataset are, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.data import tokenize_preferences
from qadapter.data.tokenization import TruncationMode
from qadapter.errors import QAdapterError

SAMPLE = 2_000
"""Pairs that are counted; more are taken to be like them."""
_CHARACTERS = 4.0
"""A token, where there is no tokenizer: English in vocabularies of 100,000 and more."""
_BATCHES = 200


class Lengths(NamedTuple):
    """Tokens of prompts and answers [P], of a sample; ``pairs`` there are in all."""

    pairs: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    counted: str
    """How."""

    @property
    def actions(self) -> float:
        """Of a pair, on average."""
        return float((self.chosen + self.rejected).mean())

    @property
    def tokens(self) -> float:
        """Of a pair, its prompt once, on average."""
        return float((self.prompt + self.chosen + self.rejected).mean())

    @property
    def attended(self) -> float:
        """Tokens that a pair's tokens look back on, summed, on average; its prompt once."""
        p, a, b = (x.astype(float) for x in (self.prompt, self.chosen, self.rejected))
        return float(((p**2 + a**2 + b**2) / 2 + p * (a + b)).mean())

    def padded(self, pairs: int) -> float:
        """Tokens a pair in batches of so many, each sequence as long as the longest."""
        longest = self.prompt + np.maximum(self.chosen, self.rejected)
        drawn = np.random.default_rng(0).integers(len(longest), size=(_BATCHES, pairs))
        return float(2 * longest[drawn].max(1).mean())


def lengths_of(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase | None, *, max_length: int | None,
    truncation_mode: TruncationMode = "keep_start",
) -> Lengths:
    """Of pairs as ``load_preferences`` gives them.

    Args:
        tokenizer: None: tokens are estimated from characters.

    Raises:
        QAdapterError: no pair of the sample can be used.
    """
    count = len(pairs)
    sample = pairs
    if count > SAMPLE:
        sample = pairs.select(np.linspace(0, count - 1, SAMPLE).astype(int).tolist())
    where = "all" if count <= SAMPLE else f"{SAMPLE:,} of them"
    if tokenizer is not None:
        found = tokenize_preferences(
            sample, tokenizer, max_length=max_length, truncation_mode=truncation_mode
        ).dataset
        prompt, chosen, rejected = (
            np.fromiter(map(len, found[f"{name}_ids"]), dtype=np.int64, count=len(found))
            for name in ("prompt", "chosen", "rejected")
        )
        kept = round(count * len(found) / len(sample))
        how = f"{where} counted with the base's tokenizer"
        return Lengths(kept, prompt, chosen, rejected, how)
    usable = sample.filter(lambda problem: problem is None, input_columns="problem")
    if not len(usable):
        raise QAdapterError(f"no pair can be used: {sample['problem'][0]}")
    prompt, chosen, rejected = (_estimated(usable, name) for name in
                                ("prompt", "chosen", "rejected"))
    if max_length is not None:
        prompt = np.minimum(prompt, max_length - 1)
        chosen, rejected = (np.minimum(x, max_length - prompt) for x in (chosen, rejected))
    return Lengths(
        round(count * len(usable) / len(sample)), prompt, chosen, rejected,
        f"{where} estimated, {_CHARACTERS:g} characters a token: the base's tokenizer is not here",
    )


def _estimated(pairs: Dataset, name: str) -> np.ndarray:
    if f"{name}_ids" in pairs.column_names:
        return np.array([len(ids) for ids in pairs[f"{name}_ids"]])
    return np.array([max(1, round(_characters(x) / _CHARACTERS)) for x in pairs[name]])


def _characters(text: str | Sequence[dict[str, str]]) -> int:
    if isinstance(text, str):
        return len(text)
    return sum(len(str(message.get("content") or "")) for message in text)
