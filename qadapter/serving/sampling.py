"""The draw of one batch's tokens: every request has settings and random numbers of its own.

A request's draws depend on its own logits and its own seed alone, whatever else is in the batch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qadapter.policy.sampling import draw_by_lookup

_LIKELIEST = 1024
"""Tokens among which top-p's nucleus is looked for first: sorting 128k takes 20 times as long."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn, as OpenAI's fields of these names say.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: in (0, 1]; top_k: 0 for all tokens.
        seed: None draws by numbers that nobody can ask for again.
        top_logprobs: how many alternatives are told with every token; None tells no
            log-probabilities at all. They are the policy's own, before penalties, temperature and
            filters.
        repetition_penalty: transformers': divides the positive logits of all tokens of prompt and
            answer, multiplies the negative ones; 1 for none.
        presence_penalty, frequency_penalty: OpenAI's: taken from the logits of the answer's tokens,
            once and as often as they came.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    top_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalises(self) -> bool:
        penalties = self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty
        return any(penalties)


class Drawing:
    """One answer's draws: its random numbers, and the tokens that its penalties are for.

    Args:
        prompt: token ids.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()):
        self.sampling = sampling
        self.generator = self._generator()
        self.read = frozenset(prompt) if sampling.penalises else frozenset()
        self.written: Counter[int] = Counter()

    def _generator(self) -> torch.Generator | None:
        """Random numbers on the CPU, the same on every device; None where nothing is drawn."""
        if self.sampling.temperature == 0:
            return None
        generator = torch.Generator()
        if self.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.sampling.seed)
        return generator

    def penalise(self, logits_V: Tensor) -> None:
        """In place."""
        sampling, device = self.sampling, logits_V.device
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted(self.read | self.written.keys()), device=device)
            if len(seen):
                logits = logits_V[seen]
                logits_V[seen] = torch.where(
                    logits < 0, logits * sampling.repetition_penalty,
                    logits / sampling.repetition_penalty,
                )
        if self.written:
            seen = torch.tensor(list(self.written), device=device)
            counts = torch.tensor(list(self.written.values()), device=device)
            logits_V[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts


class Drawn(NamedTuple):
    """A token of an answer; log-probabilities where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, best first."""


def draw(logits_NV: Tensor, drawings: Sequence[Drawing]) -> list[Drawn | None]:
    """The next token of each answer; None where its logits are NaN, or nothing but −inf.

    Args:
        logits_NV: float32 [N, V].
    """
    sound = logits_NV.amax(-1).isfinite().tolist()  # NaN is its own maximum
    samplings = [drawing.sampling for drawing in drawings]
    scores_NV = _penalised(logits_NV, drawings)
    tokens_N = scores_NV.argmax(-1)
    sampled = [i for i, d in enumerate(drawings) if d.generator is not None and sound[i]]
    if sampled:
        rows = torch.tensor(sampled, device=logits_NV.device)
        uniform = [
            torch.rand((), generator=drawings[i].generator, dtype=torch.float64) for i in sampled
        ]
        tokens_N[rows] = draw_by_lookup(
            _filtered(scores_NV[rows], [samplings[i] for i in sampled]),
            torch.stack(uniform).to(logits_NV.device),
        )
    tokens = tokens_N.tolist()
    for drawing, token in zip(drawings, tokens, strict=True):
        if drawing.sampling.penalises:
            drawing.written[token] += 1
    told = _logprobs(logits_NV, tokens, samplings)
    return [
        told.get(i, Drawn(token)) if sound[i] else None for i, token in enumerate(tokens)
    ]


def _penalised(logits_NV: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    rows = [i for i, drawing in enumerate(drawings) if drawing.sampling.penalises]
    if rows:
        logits_NV = logits_NV.clone()
    for i in rows:
        drawings[i].penalise(logits_NV[i])
    return logits_NV


def _filtered(scores_NV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Temperature, top-k and top-p, in transformers' order."""
    device = scores_NV.device
    temperature_N1 = torch.tensor([[s.temperature] for s in samplings], device=device)
    # Differences to the best, so that a small temperature makes no inf of it.
    scores_NV = (scores_NV - scores_NV.amax(-1, keepdim=True)) / temperature_N1
    for i, sampling in enumerate(samplings):
        if 0 < sampling.top_k < scores_NV.shape[1]:
            least = scores_NV[i].topk(sampling.top_k).values[-1]
            scores_NV[i].masked_fill_(scores_NV[i] < least, -torch.inf)
        if sampling.top_p < 1:
            least = _end_of_nucleus(scores_NV[i], sampling.top_p)
            scores_NV[i].masked_fill_(scores_NV[i] < least, -torch.inf)
    return scores_NV


def _end_of_nucleus(scores_V: Tensor, top_p: float) -> Tensor:
    """The least score of the smallest set of likeliest tokens that holds top_p."""
    total = scores_V.logsumexp(-1)
    for count in (min(_LIKELIEST, len(scores_V)), len(scores_V)):
        best = scores_V.topk(count).values
        reached = (best.double() - total).exp().cumsum(-1)
        if reached[-1] >= top_p:
            break
    place = int((reached < top_p).sum())
    return best[min(place, count - 1)]


def _logprobs(
    logits_NV: Tensor, tokens: Sequence[int], samplings: Sequence[Sampling]
) -> dict[int, Drawn]:
    asked = [i for i, sampling in enumerate(samplings) if sampling.top_logprobs is not None]
    if not asked:
        return {}
    logprobs_NV = logits_NV[torch.tensor(asked, device=logits_NV.device)].log_softmax(-1)
    most = max(samplings[i].top_logprobs or 0 for i in asked)
    best = logprobs_NV.topk(min(most, logprobs_NV.shape[1]))
    values, ids = best.values.tolist(), best.indices.tolist()
    found = {}
    for place, i in enumerate(asked):
        top = list(zip(ids[place], values[place], strict=True))[: samplings[i].top_logprobs]
        found[i] = Drawn(tokens[i], float(logprobs_NV[place, tokens[i]]), tuple(top))
    return found
