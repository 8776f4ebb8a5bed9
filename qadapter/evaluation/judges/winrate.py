"""Win rates and judged gains of A's answers over B's to the same prompts, several draws each.

Intervals are clustered by prompt: draws that answer one question are not independent. They hold the
variance over prompts and draws, not that over training seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qadapter.data import Prompt
from qadapter.evaluation.bootstrap import ClusterBootstrap, Estimate
from qadapter.evaluation.judges.interface import Judge, Progress, RewardJudge, wins
from qadapter.evaluation.judges.texts import PreferenceTexts


@dataclass(frozen=True)
class WinRate:
    """How often A is preferred to B."""

    num_prompts: int
    num_comparisons: int
    """With a verdict."""
    win_rate: Estimate
    """A tie counts one half."""
    tie_rate: float
    gain: Estimate | None
    """Mean score of A minus that of B, in standard deviations of B's scores; None where the judge
    gives no scores."""
    gain_P: np.ndarray | None = field(default=None, compare=False, repr=False)
    """The same at each prompt, to compare two A's with one B."""

    def as_dict(self) -> dict[str, Any]:
        """JSON types, but for the prompts; intervals under ``<name>_ci``."""
        flat: dict[str, Any] = {
            "num_prompts": self.num_prompts, "num_comparisons": self.num_comparisons,
            "tie_rate": self.tie_rate, **self.win_rate.as_dict("win_rate"),
        }
        return flat | (self.gain.as_dict("gain") if self.gain is not None else {})


def score_draws(
    judge: RewardJudge, prompts: Sequence[Prompt], draws: Sequence[Sequence[str]],
    progress: Progress | None = None,
) -> np.ndarray:
    """Scores [draws, prompts] of several answers to each prompt."""
    flat = judge.scores(
        list(prompts) * len(draws), list(itertools.chain.from_iterable(draws)), progress
    )
    return flat.reshape(len(draws), len(prompts))


def judged_gain(
    scores_a_KP: np.ndarray, scores_b_LP: np.ndarray, *,
    clusters: Sequence[Hashable] | None = None, num_resamples: int = 2000, seed: int = 0,
) -> WinRate:
    """Every draw of A against every draw of B to the same prompt.

    Args:
        scores_a_KP, scores_b_LP: of one judge, [draws, prompts]; from ``score_draws``.
        clusters: what each prompt belongs to; default: each to itself.
        num_resamples, seed: of the bootstrap over clusters (95% intervals).
    """
    a_KP, b_LP = np.atleast_2d(scores_a_KP), np.atleast_2d(scores_b_LP)
    verdicts_KLP = wins(a_KP[:, None], b_LP[None])
    bootstrap = _bootstrap(clusters, a_KP.shape[1], num_resamples, seed)
    spread = float(b_LP.std())
    # Equal scores of B give no scale to measure by.
    gain_P = (a_KP.mean(0) - b_LP.mean(0)) / (spread or math.nan)
    return _win_rate(verdicts_KLP.reshape(-1, a_KP.shape[1]), bootstrap, gain_P)


def pair_accuracy(
    judge: RewardJudge, texts: PreferenceTexts, *, num_resamples: int = 2000, seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """How often the judge ranks preference pairs right, clustered by prompt; ties are half."""
    scores = score_draws(judge, texts.prompts, [texts.chosen, texts.rejected], progress)
    bootstrap = ClusterBootstrap(texts.prompt_ids, num_resamples=num_resamples, seed=seed)
    return bootstrap.mean(wins(*scores))


def win_rate(
    judge: Judge, prompts: Sequence[Prompt], draws_a: Sequence[Sequence[str]],
    draws_b: Sequence[Sequence[str]], *, clusters: Sequence[Hashable] | None = None,
    num_resamples: int = 2000, seed: int = 0, progress: Progress | None = None,
) -> WinRate:
    """Win rate of A over B.

    A judge that gives scores compares every draw of A with every draw of B; one that compares pairs
    (and may cost money) takes each draw once, in order, going around the shorter list.

    Args:
        draws_a, draws_b: lists of draws, each with one answer a prompt.
        clusters, num_resamples, seed: as in ``judged_gain``.
        progress: called with (comparisons or answers done, of how many).
    """
    if any(len(draw) != len(prompts) for draw in (*draws_a, *draws_b)):
        raise ValueError("a draw must hold one answer a prompt")
    if isinstance(judge, RewardJudge):
        scores_a, scores_b = (
            score_draws(judge, prompts, draws, progress) for draws in (draws_a, draws_b)
        )
        return judged_gain(
            scores_a, scores_b, clusters=clusters, num_resamples=num_resamples, seed=seed
        )
    pairs = paired_draws(len(draws_a), len(draws_b))
    verdicts = judge.compare(
        list(prompts) * len(pairs), [answer for i, _ in pairs for answer in draws_a[i]],
        [answer for _, j in pairs for answer in draws_b[j]], progress,
    ).reshape(len(pairs), len(prompts))
    return _win_rate(verdicts, _bootstrap(clusters, len(prompts), num_resamples, seed), None)


def paired_draws(count_a: int, count_b: int) -> list[tuple[int, int]]:
    """(draw of A, draw of B): every draw at least once."""
    return [(i % count_a, i % count_b) for i in range(max(count_a, count_b))]


def _bootstrap(
    clusters: Sequence[Hashable] | None, count: int, num_resamples: int, seed: int
) -> ClusterBootstrap:
    names = list(range(count)) if clusters is None else list(clusters)
    if len(names) != count:
        raise ValueError("clusters must have one entry a prompt")
    return ClusterBootstrap(names, num_resamples=num_resamples, seed=seed)


def _win_rate(
    verdicts_NP: np.ndarray, bootstrap: ClusterBootstrap, gain_P: np.ndarray | None
) -> WinRate:
    given_NP = ~np.isnan(verdicts_NP)
    counts_P = given_NP.sum(0)
    means_P = np.nansum(verdicts_NP, 0) / np.maximum(counts_P, 1)
    total = int(given_NP.sum())
    ties = int((verdicts_NP == 0.5).sum())
    return WinRate(
        num_prompts=int((counts_P > 0).sum()),
        num_comparisons=total,
        # Prompts count alike, however many of their comparisons got a verdict.
        win_rate=bootstrap.mean(means_P, counts_P > 0),
        tie_rate=ties / total if total else 0.0,
        gain=None if gain_P is None else bootstrap.mean(gain_P),
        gain_P=gain_P,
    )
