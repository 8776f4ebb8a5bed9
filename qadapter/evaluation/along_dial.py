"""Answers to the same prompts along the dial, and what the adapter rewards in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from qadapter.evaluation.answers import Answer, generate_answers
from qadapter.evaluation.token_rewards import RewardedAnswer, reward_rows
from qadapter.policy.model import QAdapterModel

STRENGTHS = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class AlongDial:
    """A prompt and its answers."""

    prompt: str
    """As people read it."""
    answers: dict[float, RewardedAnswer]
    """By the strength they were given at."""
    ended: dict[float, bool]
    """Whether they end by themselves, and were not cut."""
    pair: dict[str, RewardedAnswer] = field(default_factory=dict)
    """"chosen" and "rejected" of the data."""


def answer_along_dial(
    model: QAdapterModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[str], *, known: Mapping[float, Sequence[Answer]] | None = None,
    strengths: Sequence[float] = STRENGTHS, max_new_tokens: int = 96, batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[AlongDial]:
    """Greedy answers at every strength; rewards are the trained objective's and do not move with
    it.

    Args:
        rows: of a tokenized preference dataset, a prompt each.
        prompts: the same prompts, as they are shown.
        known: strength → answers to these prompts that are there already, as long as
            ``max_new_tokens`` lets them be.
        progress: called with (answers done, answers in all).
    """
    answers = {s: list(given) for s, given in (known or {}).items() if s in strengths}
    asked = [s for s in strengths if s not in answers]
    ids = [list(row["prompt_ids"]) for row in rows]
    if asked and ids:
        # In batches over all strengths: a CPU reads the weights once for each of them.
        found = generate_answers(
            model, tokenizer, ids * len(asked), strength=[s for s in asked for _ in ids],
            max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress,
        )
        answers |= {s: found[k * len(ids) :][: len(ids)] for k, s in enumerate(asked)}
    sides = ("chosen", "rejected")
    scored = [
        *((ids[i], answers[s][i].token_ids, None) for i in range(len(ids)) for s in strengths),
        *((ids[i], list(row[f"{side}_ids"]), row.get(f"{side}_mask"))
          for i, row in enumerate(rows) for side in sides),
    ]
    rewarded = iter(reward_rows(model, tokenizer, scored, batch_size, None))
    along = [{s: next(rewarded) for s in strengths} for _ in ids]
    pairs = [{side: next(rewarded) for side in sides} for _ in ids]
    return [
        AlongDial(prompt, found, {s: answers[s][i].ended for s in strengths}, pair)
        for i, (prompt, found, pair) in enumerate(zip(prompts, along, pairs, strict=True))
    ]
