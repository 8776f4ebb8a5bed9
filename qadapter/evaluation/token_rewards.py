"""What an adapter rewards, token by token; and answers reranked by it.

By fact 8 of the design, r = q(s, a) − γ·V(s′) is an estimate of what the preferences reward, in
nats; R, its sum over an answer, is what ranks two answers to one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.data import Prompt, check_sequences
from qadapter.errors import QAdapterError
from qadapter.evaluation.answers import Answer, encode_prompt, generate_answers
from qadapter.evaluation.scoring import evaluating
from qadapter.policy.model import QAdapterModel


@dataclass(frozen=True)
class RewardedAnswer:
    """An answer and the reward of each of its tokens."""

    token_ids: list[int]
    pieces: list[str]
    """The text each token adds; joined, they are the answer. A token that ends inside a character
    adds nothing: the one that completes it adds it."""
    rewards: list[float]
    """r of each token, nats; 0 where ``scored`` is False."""
    scored: list[bool]
    """Whether a token is the model's own action (turns of others in between are not)."""

    @property
    def total(self) -> float:
        """R = Σ r, without any normalisation by length."""
        return sum(self.rewards)


@dataclass(frozen=True)
class RewardedPair:
    """A prompt, and its answers by what they are called: chosen and rejected, or one answer."""

    prompt: str
    answers: dict[str, RewardedAnswer]


def reward_pairs(
    model: QAdapterModel, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *,
    batch_size: int = 8, progress: Callable[[int, int], None] | None = None,
) -> list[RewardedPair]:
    """Rewards of the tokens of preference pairs.

    Args:
        dataset: of ``tokenize_preferences``.
        progress: called with (answers done, answers in all).
    """
    rows = [
        (row["prompt_ids"], row[f"{side}_ids"], row.get(f"{side}_mask"))
        for row in dataset for side in ("chosen", "rejected")
    ]
    answers = reward_rows(model, tokenizer, rows, batch_size, progress)
    return [
        RewardedPair(
            tokenizer.decode(row["prompt_ids"]), {"chosen": chosen, "rejected": rejected}
        )
        for row, chosen, rejected in zip(dataset, answers[::2], answers[1::2], strict=True)
    ]


def reward_answers(
    model: QAdapterModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt,
    answers: Sequence[Sequence[int]], *, batch_size: int = 8,
) -> list[RewardedAnswer]:
    """Rewards of answers to one prompt.

    Args:
        answers: token ids, the end of turn included where the answer has one.

    Raises:
        QAdapterError: an empty prompt or answer.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    if not all(len(ids) for ids in answers):
        raise QAdapterError("an answer is empty: there is no token to reward")
    rows = [(prompt_ids, list(ids), None) for ids in answers]
    return reward_rows(model, tokenizer, rows, batch_size, None)


@dataclass(frozen=True)
class Candidate:
    """One of n answers, and what it is worth."""

    answer: Answer
    reward: float
    """R, nats."""


def best_of_n(
    model: QAdapterModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, n: int, *,
    batch_size: int = 8, **sampling: Any,
) -> list[Candidate]:
    """Sample n answers and sort them by R, best first.

    They are drawn from the policy the model is set to (``set_policy(strength=0)``: from the base)
    and ranked by the trained objective's rewards, which do not move with the strength. Sums favour
    neither short nor long answers as such, but their spread grows with length.

    Args:
        n: answers to draw. Equal answers stay in.
        sampling: of ``generate_answers`` (max_new_tokens, temperature, top_p, seed, strength, …);
            ``do_sample`` is on.

    Raises:
        QAdapterError: n below 1, a model without an adapter, an empty prompt.
    """
    if n < 1:
        raise QAdapterError(f"best_of_n needs at least one answer, got n={n}")
    if not isinstance(model, QAdapterModel):
        raise QAdapterError("best_of_n ranks by an adapter's rewards; this model has none")
    answers = generate_answers(
        model, tokenizer, [prompt] * n, batch_size=batch_size, **{"do_sample": True} | sampling
    )
    rewarded = reward_answers(
        model, tokenizer, prompt, [answer.token_ids for answer in answers], batch_size=batch_size
    )
    candidates = [
        Candidate(answer, found.total) for answer, found in zip(answers, rewarded, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: -candidate.reward)


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens included."""
    pieces, start, done = [], 0, 0  # ids[start:done] are the context: their text is out
    added = tokenizer.added_tokens_decoder  # no character goes on in one of them
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:done])
        text = _decode(tokenizer, ids[start:end])
        going_on = end < len(ids) and ids[end] not in added
        if text.endswith("\N{REPLACEMENT CHARACTER}") and going_on:
            pieces.append("")  # a character is not whole yet
            continue
        pieces.append(text[len(before):])
        start, done = done, end
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def reward_rows(
    model: QAdapterModel, tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[list[int], list[int], list[bool] | None]], batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[RewardedAnswer]:
    """Rewards of (prompt, answer, mask) rows, batched by length, in the rows' order."""
    for part, name in enumerate(("prompt of answer", "answer")):
        check_sequences((row[part] for row in rows), model, tokenizer, name)
    check_sequences(([*row[0], *row[1]] for row in rows), model, tokenizer, "prompt and answer")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    found: dict[int, RewardedAnswer] = {}
    device = model.get_input_embeddings().weight.device
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            width = max(len(rows[i][0]) + len(rows[i][1]) for i in indices)
            ids = torch.zeros(len(indices), width, dtype=torch.int64)
            attention, completion = torch.zeros_like(ids), torch.zeros_like(ids).bool()
            for k, i in enumerate(indices):
                prompt, answer, mask = rows[i]
                end = len(prompt) + len(answer)
                ids[k, :end] = torch.tensor([*prompt, *answer])
                attention[k, :end] = 1
                completion[k, len(prompt) : end] = torch.tensor(mask or [True] * len(answer))
            rewards = model.token_rewards(
                ids.to(device), completion.to(device), attention.to(device)
            ).cpu()
            for k, i in enumerate(indices):
                prompt, answer, mask = rows[i]
                span = slice(len(prompt), len(prompt) + len(answer))
                found[i] = RewardedAnswer(
                    list(answer), token_pieces(tokenizer, answer), rewards[k, span].tolist(),
                    completion[k, span].tolist(),
                )
            if progress is not None:
                progress(len(found), len(rows))
    return [found[i] for i in range(len(rows))]


def summarize(pairs: Sequence[RewardedPair]) -> Mapping[str, float]:
    """Over pairs with a chosen and a rejected answer: ``pairs``, ``accuracy`` (a tie counts half)
    and mean ``margin`` in nats."""
    margins = [
        pair.answers["chosen"].total - pair.answers["rejected"].total for pair in pairs
        if {"chosen", "rejected"} <= pair.answers.keys()
    ]
    if not margins:
        return {"pairs": 0}
    return {
        "pairs": len(margins),
        "accuracy": sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins),
        "margin": sum(margins) / len(margins),
    }
