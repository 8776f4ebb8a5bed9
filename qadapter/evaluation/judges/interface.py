"""What a judge is: something that says which of two answers to a prompt is better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from qadapter.data import Prompt

Progress = Callable[[int, int], None]


class Judge(ABC):
    """Compares answers, given as text, to prompts."""

    name: str
    """What tables call it."""

    @abstractmethod
    def compare(
        self, prompts: Sequence[Prompt], answers_a: Sequence[str], answers_b: Sequence[str],
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Float64 [n] in {0, 0.5, 1}: 1 where the answer of A is better, 0.5 for a tie; NaN where
        the judge gave no verdict."""


class RewardJudge(Judge):
    """A judge that gives every answer a number of its own."""

    @abstractmethod
    def scores(
        self, prompts: Sequence[Prompt], answers: Sequence[str], progress: Progress | None = None
    ) -> np.ndarray:
        """Float64 [n]; higher is better. The scale is the judge's own: compare differences in
        standard deviations (``winrate.judged_gain``)."""

    def compare(
        self, prompts: Sequence[Prompt], answers_a: Sequence[str], answers_b: Sequence[str],
        progress: Progress | None = None,
    ) -> np.ndarray:
        scores_a, scores_b = (
            self.scores(prompts, answers, progress) for answers in (answers_a, answers_b)
        )
        return wins(scores_a, scores_b)


class LengthJudge(RewardJudge):
    """Prefers the answer with more words: what every judge must be told apart from."""

    name = "longer wins"

    def scores(
        self, prompts: Sequence[Prompt], answers: Sequence[str], progress: Progress | None = None
    ) -> np.ndarray:
        return np.array([len(answer.split()) for answer in answers], dtype=np.float64)


def wins(scores_a: np.ndarray, scores_b: np.ndarray) -> np.ndarray:
    """1 where a > b, 0.5 where they are equal, else 0; broadcasts."""
    return 0.5 * (1 + np.sign(np.asarray(scores_a, np.float64) - np.asarray(scores_b, np.float64)))


def check_lengths(prompts: Sequence[Prompt], *answers: Sequence[str]) -> None:
    """Raises ValueError unless there is one answer a prompt."""
    if any(len(prompts) != len(x) for x in answers):
        raise ValueError("prompts and answers must have the same length")
