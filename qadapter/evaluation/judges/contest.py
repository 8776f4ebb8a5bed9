"""A contest: several drawn answers of a model, its opponent and a control to the same prompts.

Draws are written down as they are made, so that a run that was broken off goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.data import Prompt
from qadapter.errors import QAdapterError
from qadapter.evaluation.answers import Answer, generate_answers
from qadapter.evaluation.judges.interface import Judge, Progress, RewardJudge
from qadapter.evaluation.judges.winrate import WinRate, judged_gain, score_draws, win_rate
from qadapter.evaluation.report import format_value, write_text
from qadapter.system.documents import parse_json
from qadapter.system.sealed import opened, sealed

Draws = list[list[Answer]]
"""[draws][prompts]"""


@dataclass(frozen=True)
class Verdict:
    """What one judge says about one contest."""

    judge: str
    contest: str
    result: WinRate

    def as_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"judge": self.judge, "contest": self.contest, **self.result.as_dict()}


class AnswerStore:
    """Draws of several players, in a JSON Lines file or, without one, in memory.

    Args:
        prompts: what all players answer, before anything that one of them is told besides.

    Raises:
        QAdapterError: a damaged file, or one that answers other prompts.
    """

    def __init__(self, file: Path | None, prompts: Sequence[Prompt]):
        self.file = file
        self.hashes = [
            hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).hexdigest()
            for prompt in prompts
        ]
        self.draws: dict[tuple[str, int], list[Answer]] = {}
        if file is None or not file.exists():
            return
        lines = file.read_bytes().rstrip(b"\n").split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = opened(parse_json(line.decode(), "the line"))
                answer = Answer(row["text"], row["token_ids"], row["ended"])
                if not isinstance(answer.text, str) or not isinstance(answer.token_ids, list):
                    raise TypeError("its text is no text or its token_ids no list")
                drawn = self.draws.setdefault((row["player"], row["draw"]), [])
                asked = row["prompt_hash"]
            except (QAdapterError, ValueError, KeyError, TypeError) as error:
                raise QAdapterError(
                    f"{file}:{number} is no answer ({error}); remove the file to draw again"
                ) from error
            if [asked] != self.hashes[len(drawn) : len(drawn) + 1]:
                raise QAdapterError(
                    f"{file}:{number} answers another prompt than the one asked now: choose "
                    "another folder, or remove the file to draw again"
                )
            drawn.append(answer)

    def draw(
        self, player: str, count: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt], *, seed: int, progress: Progress | None = None, **options: Any,
    ) -> Draws:
        """``count`` answers to every prompt; those that are there are taken as they are.

        Args:
            player: whose answers these are.
            seed: of the first draw; every further draw has the next one.
            options: of ``generate_answers``.
        """
        for number in range(count):
            if len(self.draws.get((player, number), ())) == len(self.hashes):
                continue
            done = number * len(prompts)
            answers = generate_answers(
                model, tokenizer, prompts, do_sample=True, seed=seed + number,
                progress=None if progress is None else (
                    lambda n, total, done=done: progress(done + n, total * count)
                ), **options,
            )
            self.draws[player, number] = answers
            if self.file is not None:
                self._write()
        return [self.draws[player, number] for number in range(count)]

    def _write(self) -> None:
        rows = (
            sealed({"player": player, "draw": number, "prompt_hash": name, **asdict(answer)})
            for (player, number), answers in self.draws.items()
            for name, answer in zip(self.hashes, answers, strict=False)
        )
        write_text(self.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def texts(draws: Draws) -> list[list[str]]:
    """The answers' texts, [draws][prompts]."""
    return [[answer.text for answer in answers] for answers in draws]


def hold_contests(
    judge: Judge, prompts: Sequence[Prompt], players: dict[str, Draws], *, num_resamples: int,
    seed: int, clusters: Sequence[str] | None = None, progress: Progress | None = None,
) -> list[Verdict]:
    """Every player against the last one, and the last against itself (half its draws against the
    other half: a judge without noise says one half), which costs nothing where a judge gives
    scores and is left out elsewhere.

    Args:
        players: name → draws; the opponent comes last.
        clusters: what each prompt belongs to.
    """
    *others, opponent = players
    resampling = {"num_resamples": num_resamples, "seed": seed, "clusters": clusters}
    if not isinstance(judge, RewardJudge):
        return [
            Verdict(judge.name, f"{name} – {opponent}", win_rate(
                judge, prompts, texts(players[name]), texts(players[opponent]),
                progress=progress, **resampling,
            ))
            for name in others
        ]
    scores = {
        name: score_draws(judge, prompts, texts(draws), progress)
        for name, draws in players.items()
    }
    found = [
        Verdict(judge.name, f"{name} – {opponent}",
                judged_gain(scores[name], scores[opponent], **resampling))
        for name in others
    ]
    half = len(scores[opponent]) // 2
    if half:
        found.append(Verdict(judge.name, f"{opponent} – {opponent}", judged_gain(
            scores[opponent][:half], scores[opponent][half:], **resampling
        )))
    return found


COLUMNS = ("judge", "contest", "wins", "ties", "gain")


def verdict_cells(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Text for the table's ``COLUMNS``."""
    return [
        (
            verdict.judge, verdict.contest, format_value(verdict.result.win_rate),
            format_value(verdict.result.tie_rate), format_value(verdict.result.gain, 2),
        )
        for verdict in verdicts
    ]
