"""Runs that share a cache of features and go on at once, of which some are killed.

A trial starts two or three commands in one folder at the same time and ends some of them from
outside. Then it does what a user would: the same commands again, until they are done. Asserted: as
of ``kills``, and in the end there is what a single run leaves: the same weights, the same cache.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import forks
import kills
from forks import Ended, Stop
from places import LORA, Places, facts, names

ALONE = (*LORA, "--features_only")
OTHER = (*LORA, "--output_dir", "other")
SCENARIOS: dict[str, tuple[tuple[str, ...], ...]] = {
    "features": (ALONE, ALONE, ALONE),
    "a run and a helper": (LORA, ALONE),
    "two runs": (LORA, OTHER),
}
"""Name → commands that begin together."""
SHARES = {"features": 2, "a run and a helper": 1, "two runs": 1}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What runs leave, and how they end, that have the cache for themselves."""

    left: kills.Undisturbed
    alone: Ended
    """Of one that makes features and stops."""


def prepare(scenario: str, places: Places, home: Path) -> Prepared:
    left = kills.Undisturbed.of("lora", places, home)
    shutil.rmtree(home)
    alone = forks.run(ALONE, places.copy("bare", home))
    if alone.code != 0:
        raise SystemExit(f"features, undisturbed, ended with {alone.code}: {alone.err}")
    return Prepared(left, alone)


def trial(
    scenario: str, seed: int, places: Places, prepared: Prepared, home: Path
) -> tuple[str, str | None]:
    """(how they were killed, what is wrong or None)."""
    rng = random.Random(f"{scenario}:{seed}")
    commands = SCENARIOS[scenario]
    places.copy("bare", home)
    killed = rng.sample(range(len(commands)), rng.randint(1, len(commands)))
    stops: list[Stop | None] = [None] * len(commands)
    for number in killed:
        whole = prepared.alone if commands[number] == ALONE else prepared.left.ended
        stops[number] = kills.draw(whole, rng)
    ended = forks.at_once([(argv, home, stop) for argv, stop in zip(commands, stops, strict=True)])
    how = "; ".join(
        "lives" if stop is None else kills.describe(stop, end)
        for stop, end in zip(stops, ended, strict=True)
    )
    for stop, end in zip(stops, ended, strict=True):
        if wrong := _wrong(stop, end):
            return how, wrong
    return how, _go_on(commands, home, prepared.left, rng)


def _wrong(stop: Stop | None, ended: Ended) -> str | None:
    if stop is not None:
        return kills.wrong_when_stopped(ended, stop)
    if ended.code != 0:
        return f"one that nobody killed ended with {ended.code}: {ended.err[-300:]}"
    return ended.wrong()


def _go_on(
    commands: tuple[tuple[str, ...], ...], home: Path, undisturbed: kills.Undisturbed,
    rng: random.Random,
) -> str | None:
    if wrong := kills.finish(LORA, home, rng, lambda: _differences(home, undisturbed)):
        return wrong
    if OTHER in commands:
        wrong = kills.finish(OTHER, home, rng, lambda: _other_weights(home)) or _other_weights(home)
        if wrong:
            return f"the other run: {wrong}"
    # What the killed ones held of the cache goes when it is used the next time.
    if wrong := forks.run(ALONE, home).wrong():
        return f"the cache, used once more: {wrong}"
    return _differences(home, undisturbed)


def _other_weights(home: Path) -> str | None:
    ours, theirs = (facts(home, (f"{name}/*.safetensors",)) for name in ("other", "run"))
    return None if list(ours.values()) == list(theirs.values()) else "not the weights of the first"


def _differences(home: Path, undisturbed: kills.Undisturbed) -> str | None:
    ours = {n: x for n, x in facts(home).items() if not n.startswith("other/")}
    there = {n for n in names(home) if n != "other" and not n.startswith("other/")}
    return kills.differences(ours, there, home, undisturbed)
