"""The parts that preference data is cut into, and the texts that retention is measured on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.compare.config import DataConfig, RetentionTexts
from qadapter.data import (
    NOTES,
    Prompt,
    load_preferences,
    prompt_of,
    read_texts,
    split_by_prompt,
    tokenize_preferences,
    without_prompts,
)
from qadapter.data.passages import BUILT_IN, passages
from qadapter.errors import QAdapterError


class Part(NamedTuple):
    """The same pairs twice."""

    tokens: Dataset
    """Tokenized, as training and scoring take them."""
    pairs: Dataset
    """As ``load_preferences`` gives them: for judges, and for prompts as they were written."""

    def prompts(self, count: int, seed: int) -> tuple[list[str], list[Prompt]]:
        """(prompt_id, prompt) of up to ``count`` different prompts."""
        first = {name: i for i, name in reversed(list(enumerate(self.pairs["prompt_id"])))}
        names = sorted(first)
        names = sorted(random.Random(seed).sample(names, min(count, len(names))))
        return names, [prompt_of(self.pairs[first[name]]) for name in names]


class PreferenceData(NamedTuple):
    """Parts that share no prompt."""

    train: Part
    validation: Part
    test: Part
    judge: Part
    summary: str
    """What was kept and dropped."""

    @property
    def prompt_ids(self) -> set[str]:
        """Of all parts."""
        parts = self.train, self.validation, self.test, self.judge
        return {name for part in parts for name in part.tokens["prompt_id"]}


def prepare(
    config: DataConfig, file: str, tokenizer: PreTrainedTokenizerBase, key: str,
    without: Iterable[str] = (),
) -> PreferenceData:
    """Read, tokenize and cut by prompt.

    Args:
        file: the data set, where it is. key: where this stands in the configuration, for messages.
        without: ids of prompts that are left out before anything is cut.

    Raises:
        QAdapterError: data that can't be read, or too few prompts for the parts.
    """
    pairs = load_preferences(
        file, split=config.dataset_split, columns=config.columns,
        domain=config.domain, rejected_domains=config.rejected_domains, limit=config.max_rows,
    )
    tokens, report = tokenize_preferences(pairs, tokenizer, max_length=config.max_length)
    tokens = tokens.add_column("pair", report.indices.tolist())
    summary, all_pairs = report.summary(), len(tokens)
    for note, count in report.notes.items():
        if note.endswith("left_out"):
            summary += f"; {count} × {NOTES[note]}"
    tokens = without_prompts(tokens, without)
    if len(tokens) < all_pairs:
        summary += f"; left out: {all_pairs - len(tokens)} whose prompt the new preference has"
    try:
        parts = split_by_prompt(
            tokens, (config.validation, config.test, config.judge), config.split_seed
        )
    except QAdapterError as error:
        raise QAdapterError(f"{key}: {error}") from error
    train, *held_out = parts
    if config.train is not None:
        chosen = sorted(set(train["prompt_id"]))
        random.Random(config.split_seed).shuffle(chosen)
        train = _of_prompts(train, chosen[: config.train])
    thin = (_thin(part, config) for part in (train, *held_out))
    return PreferenceData(
        *(Part(part.remove_columns("pair"), pairs.select(part["pair"][:])) for part in thin),
        summary=summary,
    )


def _of_prompts(dataset: Dataset, prompt_ids: Iterable[str]) -> Dataset:
    wanted = set(prompt_ids)
    return dataset.select([i for i, p in enumerate(dataset["prompt_id"]) if p in wanted])


def _thin(dataset: Dataset, config: DataConfig) -> Dataset:
    """At most so many pairs of each prompt, drawn."""
    most, own = config.pairs_per_prompt, {}
    for index, prompt in enumerate(dataset["prompt_id"]):
        own.setdefault(prompt, []).append(index)
    rng = random.Random(config.split_seed)
    return dataset.select(sorted(
        i for indices in own.values()
        for i in (indices if most is None else rng.sample(indices, min(most, len(indices))))
    ))


class Texts(NamedTuple):
    """What retention is measured on, as ``evaluate_retention`` takes it."""

    texts: Sequence[str] | Sequence[Sequence[int]]
    prompt_lengths: list[int] | None = None


def load_texts(
    texts: RetentionTexts, file: str, tokenizer: PreTrainedTokenizerBase
) -> Texts:
    """Read unrelated texts.

    Raises:
        QAdapterError: a file that is missing, empty or of another form.
    """
    if texts.preferred:
        return _preferred(texts, file, tokenizer)
    if texts.file == BUILT_IN:
        lines = passages(held_to=False if texts.unseen else None)
    else:
        lines = read_texts(file)
    return Texts(lines[: texts.max_texts])


def _preferred(texts: RetentionTexts, file: str, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """One preferred answer of each prompt, behind its prompt."""
    pairs = load_preferences(file, domain=texts.domain)
    first = {name: i for i, name in reversed(list(enumerate(pairs["prompt_id"])))}
    rows = sorted(first.values())
    if texts.max_texts is not None:
        rows = rows[: 2 * texts.max_texts]  # some may be too long
    tokens, _ = tokenize_preferences(pairs.select(rows), tokenizer, max_length=texts.max_length)
    tokens = tokens.select(range(min(len(tokens), texts.max_texts or len(tokens))))
    return Texts(
        [p + c for p, c in zip(tokens["prompt_ids"], tokens["chosen_ids"], strict=True)],
        [len(p) for p in tokens["prompt_ids"]],
    )
