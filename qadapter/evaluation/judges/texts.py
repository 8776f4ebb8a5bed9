"""Preference pairs as texts: what judges are trained on and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.evaluation.answers import Prompt


class PreferenceTexts(NamedTuple):
    """One entry a pair."""

    prompts: list[Prompt]
    chosen: list[str]
    rejected: list[str]
    prompt_ids: list[str]
    """The ``prompt_id`` of ``load_preferences``: equal for equal prompts, in any dataset."""


def preference_texts(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreferenceTexts:
    """Canonical pairs as texts; unusable pairs, and those whose answers read alike, are left out.

    Args:
        pairs: from ``load_preferences``.
        tokenizer: needed for pairs that are token ids.

    Raises:
        QAdapterError: no pair left; token ids without a tokenizer.
    """
    found = PreferenceTexts([], [], [], [])
    for row in pairs:
        if row["problem"] is not None:
            continue
        if "prompt_ids" in row:
            if tokenizer is None:
                raise QAdapterError("pairs of token ids can't be judged without their tokenizer")
            prompt: Prompt = row["prompt_ids"]
            chosen, rejected = (
                tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True)
                for side in ("chosen", "rejected")
            )
        else:
            prompt = row["prompt"]
            chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
        if chosen.strip() == rejected.strip():
            continue
        for column, value in zip(
            found, (prompt, chosen.strip(), rejected.strip(), row["prompt_id"]), strict=True
        ):
            column.append(value)
    if not found.prompts:
        raise QAdapterError("no pair can be judged: their answers are unusable or all alike")
    return found


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a judge reads it: a lone user's message as it is, a conversation with its roles.

    Raises:
        QAdapterError: token ids.
    """
    if isinstance(prompt, str):
        return prompt
    if not all(isinstance(message, Mapping) for message in prompt):
        raise QAdapterError("this judge reads text: prompts given as token ids can't be judged")
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _text(answer: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(answer, str):
        return answer
    return "\n\n".join(str(message["content"]) for message in answer if message["content"])
