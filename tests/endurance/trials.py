"""What a trial is to the runner: a name, folders, a verdict; many of them at once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from places import Places


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family of trials, such as kills."""

    shares: Mapping[str, int]
    """Scenario → how many of a round's trials it gets."""
    prepare: Callable[[str, Places, Path], Any]
    """(scenario, places, a folder to be made) → what its trials are compared with."""
    trial: Callable[[str, int, Places, Any, Path], tuple[str, str | None]]
    """(scenario, seed, places, what was prepared, a folder to be made) → (what was done, what is
    wrong or None)."""

    def only(self, scenarios: Sequence[str] | None) -> Kind:
        """Trials of these scenarios alone; None: of all."""
        shares = {
            name: n for name, n in self.shares.items() if scenarios is None or name in scenarios
        }
        return dataclasses.replace(self, shares=shares)

    def names(self, kind: str, seed: int = 0) -> Iterator[str]:
        """Names of trials without end, all scenarios mixed by their shares."""
        one_round = [
            name for part in range(max(self.shares.values()))
            for name, share in self.shares.items() if part < share
        ]
        seeds = {name: itertools.count(seed) for name in self.shares}
        return (f"{kind}:{name}:{next(seeds[name])}" for name in itertools.cycle(one_round))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a trial."""

    name: str
    how: str
    wrong: str | None
    seconds: float


class Runner:
    """Runs trials in processes forked from this one, whose threads and memory stay as they are.

    Args:
        work: a folder for all that is written.
    """

    def __init__(self, kinds: Mapping[str, Kind], work: Path, workers: int):
        self.kinds, self.work, self.workers = kinds, work, workers
        self.places = Places(work / "places")
        self._prepared: dict[str, Any] = {}

    def prepare(self, name: str) -> None:
        """What a trial needs and others of its scenario share: here, so that forks have it."""
        kind, scenario, _ = name.split(":")
        if (key := f"{kind}:{scenario}") not in self._prepared:
            home = self.work / "undisturbed"
            self._prepared[key] = self.kinds[kind].prepare(scenario, self.places, home)
            shutil.rmtree(home, ignore_errors=True)

    def one(self, name: str) -> Verdict:
        """A trial, in this process."""
        self.prepare(name)
        kind, scenario, seed = name.split(":")
        home, start = self.work / f"trial-{name.replace(':', '-').replace(' ', '-')}", time.time()
        try:
            how, wrong = self.kinds[kind].trial(
                scenario, int(seed), self.places, self._prepared[f"{kind}:{scenario}"], home
            )
        except (Exception, SystemExit):
            how, wrong = "the trial itself broke", traceback.format_exc()
        finally:
            shutil.rmtree(home, ignore_errors=True)
        return Verdict(name, how, wrong, time.time() - start)

    def many(self, names: Iterable[str]) -> Iterator[Verdict]:
        """Trials as they end, in any order."""
        running: dict[int, int] = {}
        names = iter(names)
        while True:
            while len(running) < self.workers and (name := next(names, None)) is not None:
                self.prepare(name)
                read, write = os.pipe()
                pid = os.fork()
                if pid == 0:
                    try:
                        verdict = json.dumps(dataclasses.asdict(self.one(name)))
                        os.write(write, verdict.encode())
                    finally:
                        os._exit(0)
                os.close(write)
                running[pid] = read
            if not running:
                return
            # What is written is short: a pipe holds it.
            pid, status = os.wait()
            with open(running.pop(pid)) as file:
                text = file.read()
            if status != 0 or not text:
                raise RuntimeError(f"a trial's process ended with {status}")
            yield Verdict(**json.loads(text))
