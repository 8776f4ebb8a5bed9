"""Runs that are killed, and what the next one makes of it.

A trial starts a command on a copy of a folder and ends it from outside: at a moment, at a file
operation, in the middle of a file. Then it does what a user would: the same command again, with
what the refusal names if it refuses. Asserted: no run hangs, shows a traceback or ends in anything
but one line; a refusal names a way on, and it works; in the end there is what a run that nobody
disturbed leaves: the same weights and numbers, the same files and no other.
"""

from __future__ import annotations

import dataclasses
import random
import signal
from collections.abc import Callable
from pathlib import Path

import forks
from forks import Ended, Stop
from places import COMPARE, EVAL, HEAD, JUDGE, LORA, MEASURED, STREAMED, Places, facts, names

from qadapter.system.manifest import MANIFEST_NAME

RESUME, REPLACE = ("--resume_from_checkpoint", "true"), ("--overwrite_output_dir",)
POLITE = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Signals that a run may answer, and the exit code it then has."""

EXPORT = ("export", "run", "--output_dir", "exported")
SCENARIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "head": ("bare", HEAD),
    "lora": ("bare", LORA),
    "streamed": ("bare", STREAMED),
    "replaced": ("another", (*HEAD, *REPLACE)),
    "rewritten": ("head", (*HEAD, "--resume_from_checkpoint", "run/checkpoint-2")),
    "measured": ("bare", MEASURED),
    "demo": ("bare", ("demo", "--fast", "--model_name_or_path", "base", "--output_dir", "demo")),
    "compare": ("bare", COMPARE),
    "judge": ("plain", JUDGE),
    "eval": ("plain", EVAL),
    "merged": ("plain", EXPORT),
    "lm_head_lora": ("plain", (*EXPORT, "--form", "lm_head_lora")),
    "peft": ("plain lora", (*EXPORT, "--form", "peft")),
}
"""Name → (the folder it begins with, the command)."""
SHARES = {"head": 20, "lora": 20, "streamed": 10, "replaced": 10, "rewritten": 10, "measured": 6,
          "judge": 6, "eval": 4, "demo": 3, "compare": 3, "merged": 3, "lm_head_lora": 3, "peft": 3}
"""Of a round's trials; those of exports wait for a fresh process that checks them."""


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a run leaves that nobody killed."""

    ended: Ended
    facts: dict[str, str]
    names: set[str]

    @classmethod
    def of(cls, scenario: str, places: Places, home: Path) -> Undisturbed:
        place, argv = SCENARIOS[scenario]
        ended = forks.run(argv, places.copy(place, home))
        if ended.code != 0:
            raise SystemExit(f"{scenario}, undisturbed, ended with {ended.code}: {ended.err}")
        return cls(ended, facts(home), names(home))


def trial(
    scenario: str, seed: int, places: Places, undisturbed: Undisturbed, home: Path
) -> tuple[str, str | None]:
    """(how it was killed, what is wrong or None)."""
    place, argv = SCENARIOS[scenario]
    rng = random.Random(f"{scenario}:{seed}")
    places.copy(place, home)
    killed = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        stop = draw(undisturbed.ended, rng)
        flags = RESUME if killed and argv[0] == "train" and RESUME[0] not in argv else ()
        ended = forks.run((*argv, *flags), home, stop)
        killed.append(describe(stop, ended))
        if wrong := wrong_when_stopped(ended, stop):
            return "; ".join(killed), wrong
    wrong = finish(argv, home, rng, lambda: _differences(home, undisturbed))
    return "; ".join(killed), wrong or _differences(home, undisturbed)


def draw(whole: Ended, rng: random.Random) -> Stop:
    kind = rng.choice(("moment", "operation", "write"))
    with_children = rng.random() < 0.5
    if kind == "moment":
        sent = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        return Stop(kind, rng.uniform(0, whole.seconds), 0, sent, with_children)
    if kind == "operation":
        return Stop(kind, rng.randrange(whole.operations), with_children=with_children)
    return Stop(kind, rng.randrange(whole.writes), int(10 ** rng.uniform(0, 5)),
                with_children=with_children)


def describe(stop: Stop, ended: Ended) -> str:
    at = f"{stop.at:.3f} s" if stop.kind == "moment" else f"{stop.kind} {stop.at}"
    size = f" of {stop.size} bytes" if stop.kind == "write" else ""
    return f"{stop.signal.name} at {at}{size} ({ended.code}, after {ended.last})"


def wrong_when_stopped(ended: Ended, stop: Stop) -> str | None:
    """Killed, it says nothing; a signal that can be answered has its own exit code; and it may have
    been done before."""
    if ended.code < 0:
        return None
    if ended.code == POLITE.get(stop.signal):
        ended = dataclasses.replace(ended, code=2)
    if stop.kind == "write" and ended.code == 2:
        return None  # a process that it started met the limit: what it says of that is its own
    return (wrong := ended.wrong()) and f"stopped by {stop.signal.name}: {wrong}"


def finish(
    argv: tuple[str, ...], home: Path, rng: random.Random, differences: Callable[[], str | None]
) -> str | None:
    """Give a command again until it is done, as its refusals say; what is wrong with that.

    Args:
        differences: told of what is there where it refuses.
    """
    flags = RESUME if argv[0] == "train" and RESUME[0] not in argv and rng.random() < 0.5 else ()
    tried = []
    while True:
        ended = forks.run((*argv, *flags), home)
        if wrong := ended.wrong():
            return f"going on{_with(flags)}: {wrong}"
        if ended.code == 0 or differences() is None:
            return None  # or refused, as all of it is there
        tried.append(flags)
        flags = _way_on(ended.error, tried)
        if flags is None:
            return f"going on{_with(tried[-1])} is refused, no way on named: {ended.error}"


def _way_on(refusal: str, tried: list[tuple[str, ...]]) -> tuple[str, ...] | None:
    """What the line says can be done."""
    resume, replace = (way[0].removeprefix("--") for way in (RESUME, REPLACE))
    named: list[tuple[str, ...]] = []
    if f"without {resume}" in refusal.replace("--", "") or "with the same options" in refusal:
        named = [()]
    elif resume in refusal:
        named = [RESUME]
    if replace in refusal:
        named.append(REPLACE)
    return next((way for way in named if way not in tried), None)


def _with(flags: tuple[str, ...]) -> str:
    return f" with {' '.join(flags)}" if flags else ""


def _differences(home: Path, undisturbed: Undisturbed) -> str | None:
    return differences(facts(home), names(home), home, undisturbed)


def differences(
    found: dict[str, str], everything: set[str], home: Path, undisturbed: Undisturbed
) -> str | None:
    """Between what is there and what a run leaves that nobody killed.

    Args:
        found: facts. everything: names of files and folders.
    """
    expected = undisturbed.facts
    differing = [n for n in expected if n in found and found[n] != expected[n]]
    # Whoever is asked to end leaves a checkpoint where none was planned: a result, if it is whole.
    whole = [path.parent for path in home.glob(f"run/checkpoint-*/{MANIFEST_NAME}")]
    planned = {name.split("/")[1] for name in expected if name.startswith("run/checkpoint-")}
    asked = {path.name for path in whole} - planned
    there = {name for name in everything if not asked & set(name.split("/")[1:2])}
    parts = [
        f"{what}: {', '.join(sorted(items)[:6])}"
        for what, items in (
            ("other results", differing), ("missing", undisturbed.names - there),
            ("litter", there - undisturbed.names),
        ) if items
    ]
    return "; ".join(parts) or None
