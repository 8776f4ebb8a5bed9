"""Judges of answers, and win rates by them.

``judge.scores(prompts, answers)`` for those that give numbers, ``judge.compare(prompts, answers_a,
answers_b)`` for all; ``win_rate`` and ``judged_gain`` put intervals around what they say.
"""

from qadapter.evaluation.judges.interface import Judge, LengthJudge, RewardJudge
from qadapter.evaluation.judges.texts import PreferenceTexts, preference_texts
from qadapter.evaluation.judges.trained import HiddenStateJudge, WordPresenceJudge
from qadapter.evaluation.judges.winrate import (
    WinRate,
    judged_gain,
    pair_accuracy,
    score_draws,
    win_rate,
)

__all__ = [
    "HiddenStateJudge",
    "Judge",
    "LengthJudge",
    "PreferenceTexts",
    "RewardJudge",
    "WinRate",
    "WordPresenceJudge",
    "judged_gain",
    "pair_accuracy",
    "preference_texts",
    "score_draws",
    "win_rate",
]
