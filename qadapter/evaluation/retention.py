"""What was kept: how far the customised policy stands from its base on text of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.data import check_sequences
from qadapter.errors import QAdapterError
from qadapter.evaluation.bootstrap import ClusterBootstrap, Estimate
from qadapter.evaluation.scoring import Scorer, evaluating
from qadapter.policy.model import QAdapterModel
from qadapter.system.textfiles import check_unicode


@dataclass(frozen=True)
class TextScores:
    """Sums over the scored tokens of each text [P]; NumPy float64, nats."""

    tokens: np.ndarray
    """int64."""
    base_logp: np.ndarray
    policy_logp: np.ndarray
    kl_base_policy: np.ndarray
    kl_policy_base: np.ndarray
    same_top1: np.ndarray
    """How often both have the same most likely token."""


@dataclass(frozen=True)
class RetentionResult:
    """What ``evaluate_retention`` found; estimates carry intervals clustered by text. A plain model
    has a perplexity, as a base, and the rest is None."""

    num_texts: int
    num_tokens: int
    kl_per_token: Estimate | None
    """KL(π‖π̃), nats a token: base against customised."""
    kl_policy_base_per_token: Estimate | None
    """KL(π̃‖π), nats a token, at the same states."""
    top1_agreement: Estimate | None
    """Share of states at which both have the same most likely token."""
    perplexity: Estimate | None
    """Of the customised policy."""
    perplexity_base: Estimate
    texts: TextScores

    def as_dict(self) -> dict[str, Any]:
        """All but the texts, as JSON types; intervals under ``<name>_ci``."""
        flat: dict[str, Any] = {"num_texts": self.num_texts, "num_tokens": self.num_tokens}
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                flat |= value.as_dict(name)
        return flat


def evaluate_retention(
    model: PreTrainedModel, texts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None = None, *,
    prompt_lengths: Sequence[int] | None = None, max_length: int = 512, batch_size: int = 8,
    strength: float | None = None,
    clusters: Sequence[Hashable] | None = None, num_resamples: int = 2000, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RetentionResult:
    """KL both ways, top-1 agreement and perplexity on texts, in float32 from the hidden states on.

    An untrained adapter gives KL 0 and the base's own perplexity, to the last digit.

    Args:
        model: a ``QAdapterModel``, or a plain causal LM.
        texts: strings (with the tokenizer's special tokens put in), or token ids.
        tokenizer: needed for strings.
        prompt_lengths: tokens at the start of each text that are read but not scored; default 0.
            Position 0 has no state before it and is never scored.
        max_length: tokens read of each text.
        strength: dial of the policy; default: as the model is set.
        clusters: what each text belongs to (a prompt, an article); default: each to itself.
        num_resamples, seed: of the bootstrap over clusters (95% intervals).
        progress: called with (texts done, texts in all).

    Raises:
        QAdapterError: no token to score; a token that the model does not know; strings without a
            tokenizer.
    """
    sequences = [list(ids)[:max_length] for ids in _token_ids(texts, tokenizer)]
    check_sequences(sequences, model, tokenizer, "retention text")
    starts = [max(1, n) for n in prompt_lengths or [1] * len(sequences)]
    names = list(range(len(sequences)) if clusters is None else clusters)
    if not len(starts) == len(names) == len(sequences):
        raise ValueError("texts, prompt_lengths and clusters must have one entry a text")
    used = [i for i, ids in enumerate(sequences) if len(ids) > starts[i]]
    if not used:
        raise QAdapterError("retention: no text has a token to score (two tokens are needed)")
    sequences, starts, names = ([x[i] for i in used] for x in (sequences, starts, names))
    with evaluating(model):
        scored = _score_texts(model, sequences, starts, batch_size, strength, progress)
    bootstrap = ClusterBootstrap(names, num_resamples=num_resamples, seed=seed)

    def per_token(sums: np.ndarray) -> Estimate:
        return bootstrap.mean(sums / scored.tokens, scored.tokens)

    customised = isinstance(model, QAdapterModel)
    return RetentionResult(
        num_texts=len(sequences),
        num_tokens=int(scored.tokens.sum()),
        kl_per_token=per_token(scored.kl_base_policy) if customised else None,
        kl_policy_base_per_token=per_token(scored.kl_policy_base) if customised else None,
        top1_agreement=per_token(scored.same_top1) if customised else None,
        perplexity=per_token(-scored.policy_logp).map(_exp) if customised else None,
        perplexity_base=per_token(-scored.base_logp).map(_exp),
        texts=scored,
    )


def _exp(nats: float) -> float:
    """Infinite where it overflows."""
    return math.inf if nats > 709 else math.exp(nats)


def _token_ids(
    texts: Sequence[str] | Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None
) -> Sequence[Sequence[int]]:
    if not any(isinstance(text, str) for text in texts):
        return texts
    if tokenizer is None:
        raise QAdapterError("retention: texts given as strings need a tokenizer")
    check_unicode(texts, "retention text")
    return tokenizer(list(texts), verbose=False)["input_ids"]


def _score_texts(
    model: PreTrainedModel, sequences: list[list[int]], starts: list[int], batch_size: int,
    strength: float | None, progress: Callable[[int, int], None] | None,
) -> TextScores:
    scorer = Scorer(model, strength=strength, rewards=False)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    sums = np.empty((6, len(sequences)))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        input_ids, attention_mask, scored = (
            x.to(scorer.device)
            for x in _pad([sequences[i] for i in indices], [starts[i] for i in indices])
        )
        adapter_hidden, base_hidden = scorer.hidden_streams(input_ids, attention_mask)
        row_N, position_N = scored.nonzero(as_tuple=True)
        states = row_N, position_N - 1
        scores = scorer.score(
            adapter_hidden[states], base_hidden[states], input_ids[row_N, position_N]
        )
        columns = (torch.ones_like(row_N), *scores[:5])
        for k, x_N in enumerate(columns):
            total = torch.zeros(len(indices), dtype=torch.float64, device=scorer.device)
            sums[k, indices] = total.index_add(0, row_N, x_N.double()).cpu().numpy()
        if progress is not None:
            progress(first + len(indices), len(order))
    return TextScores(sums[0].astype(np.int64), *sums[1:])


def _pad(sequences: list[list[int]], starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, which positions are scored), [B, T], padded on the right."""
    shape = len(sequences), max(map(len, sequences))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask, scored = torch.zeros_like(input_ids), torch.zeros(shape, dtype=torch.bool)
    for i, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        scored[i, start : len(ids)] = True
    return input_ids, attention_mask, scored
