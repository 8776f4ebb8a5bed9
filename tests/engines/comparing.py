"""Whether an engine's answers are ours: the same tokens of the same log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies import Answer, Expected, Reference

END = ""
"""Of an answer that ended by itself, in the place of a token."""


@dataclass(frozen=True)
class Compared:
    """What an engine's answers have in common with ours. After a first difference two answers are
    about different texts: no more of them is compared."""

    same: int
    """Tokens."""
    compared: int
    """The same and, for each answer that parts from ours, one more."""
    difference: float | None
    """The largest of the log-probability of a token both chose; None: the engine gives none."""
    gaps: tuple[float, ...]
    """By how much our choice is likelier than the engine's, by our own numbers, where they part."""
    tolerance: float

    @property
    def wrong(self) -> list[str]:
        """What rounding doesn't explain. Two values within the tolerance each can change places
        where their gap is no more than twice that."""
        found = [
            f"a token {gap:.2g} nats less likely than ours was chosen"
            for gap in self.gaps if gap > 2 * self.tolerance
        ]
        if self.difference is not None and self.difference > self.tolerance:
            found.append(f"a log-probability differs by {self.difference:.2g} nats, more than "
                         f"{self.tolerance:.2g}")
        return found


def compare(expected: Expected, answers: Sequence[Answer]) -> Compared:
    """All answers, in the order of the prompts."""
    same, differences, gaps = 0, [], []
    for ours, theirs in zip(expected.references, answers, strict=True):
        places = list(zip(_words(ours.answer), _words(theirs), strict=False))
        first = next((i for i, (a, b) in enumerate(places) if a != b), len(places))
        said = min(first, len(ours.answer.tokens))
        same += said
        if theirs.logprobs is not None:
            differences += [
                abs(a - b) for a, b in
                zip(ours.answer.logprobs[:said], theirs.logprobs[:said], strict=True)
            ]
        if first < len(places):
            gaps.append(_gap(ours, *places[first], first))
    return Compared(
        same, same + len(gaps), max(differences) if differences else None, tuple(gaps),
        expected.tolerance,
    )


def _words(answer: Answer) -> tuple[str, ...]:
    return (*answer.tokens, END) if answer.ended else answer.tokens


def _gap(ours: Reference, our_word: str, their_word: str, place: int) -> float:
    """Infinite for what is not among the likeliest."""
    likely = ours.candidates[place]
    best = max(likely.values())
    return best - likely.get(their_word, float("-inf"))
