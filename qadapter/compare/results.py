"""What a results folder holds, as numbers over seeds: what the table, pictures and page show."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qadapter.compare.config import BASE, TOUCHED_NAME, CompareConfig, Row, swept
from qadapter.compare.kinds import Prompted
from qadapter.compare.measure import trusted
from qadapter.compare.run import TRAINING_NAME, require_same, run_folder
from qadapter.errors import QAdapterError
from qadapter.system.documents import parse_json
from qadapter.system.sealed import opened
from qadapter.system.textfiles import read_text, split_lines


class Spread(NamedTuple):
    """A number over seeds. ``sd``: between seeds, None for one; ``low`` and ``high``: means of the
    runs' 95% intervals (over prompts or texts), None where there are none."""

    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Result:
    """All finished runs of one row; for the base, one without training."""

    row: Row
    trainings: list[dict[str, Any]]
    """One a seed; none for the base and for controls."""
    runs: list[dict[str, Any]]
    """What ``measure.evaluate`` gave, one a seed."""

    @property
    def strengths(self) -> list[float]:
        return sorted({point["strength"] for run in self.runs for point in run["dial"]})

    @property
    def trained(self) -> float:
        """The setting that tables show: the trained policy, or the base itself."""
        untouched = self.row.name == BASE or isinstance(self.row.method, Prompted)
        return 0.0 if untouched else 1.0

    def number(self, measure: Measure) -> Spread | None:
        """A measure at the trained policy, over all seeds."""
        return _at(self.runs, self.trained, measure)

    def dial(self, *measures: Measure) -> list[tuple[float, list[Spread | None]]]:
        """(strength, the measures there) along the dial, over the seeds that have all of it."""
        whole = [run for run in self.runs if len(run["dial"]) == len(self.strengths)]
        return [(w, [_at(whole, w, m) for m in measures]) for w in self.strengths]


Measure = Callable[[dict[str, Any], dict[str, Any]], "tuple[float, list[float] | None] | None"]
"""A run and one point of its dial → a number and its interval."""


@dataclass(frozen=True)
class Comparison:
    """A results folder, for one split."""

    title: str
    split: str
    results: list[Result]
    """The base first."""
    config: dict[str, Any]
    judges: dict[str, dict[str, dict[str, Any]]]
    """Kind of preference → judge → its accuracy on the split's own pairs; results hold what those
    say that are ``trusted``."""
    touched: list[dict[str, Any]]

    @property
    def sampled(self) -> bool:
        """Whether answers were sampled."""
        return bool(self.judges["new"])

    @property
    def judged(self) -> bool:
        """Whether they were, and a judge is trusted that scored them."""
        return "new" in self.judged_kinds

    @property
    def judged_kinds(self) -> list[str]:
        """Kinds of preference that a trusted judge scored the answers by."""
        return [kind for kind, judges in self.judges.items() if any(map(trusted, judges.values()))]

    @property
    def left_out(self) -> list[tuple[str, str, float | None]]:
        """Judges that are not trusted: kind of preference, name, accuracy."""
        return [
            (kind, name, judge["accuracy"]) for kind, judges in self.judges.items()
            for name, judge in judges.items() if not trusted(judge)
        ]

    @property
    def main(self) -> list[Result]:
        """Without the rows that only a sweep asks for."""
        return [result for result in self.results if result.row.sweep is None]

    @property
    def texts(self) -> list[str]:
        return list(self.results[0].runs[0]["dial"][0]["retention"])

    @property
    def reference(self) -> Result | None:
        """The row that the others are compared with, if the comparison names one that is done."""
        return next((r for r in self.results if r.row.name == self.config["reference"]), None)

    def sweep(self, name: str) -> list[tuple[float | str, Result]]:
        """(value, result) along a sweep, in the order of its values; a method that has one of them
        is a part of it."""
        sweep = self.config["sweeps"][name]
        found = {r.row.value: r for r in self.results if r.row.sweep == name}
        own = self.value_of(sweep)
        for result in self.results:
            if result.row.name == sweep["of"] and own in sweep["values"]:
                found[own] = result
        return [(value, found[value]) for value in sweep["values"] if value in found]

    def value_of(self, sweep: dict[str, Any]) -> float | str:
        """What the method that a sweep varies has itself."""
        method, option = self.config["methods"][sweep["of"]], swept(sweep["option"])[-1]
        if option.startswith("adapter."):
            return (method["adapter"] or self.config["adapter"])[option.removeprefix("adapter.")]
        return method[option]


def read_results(config: CompareConfig, folder: str | Path, split: str) -> Comparison:
    """Read what is finished.

    Raises:
        QAdapterError: nothing is, or what is is another comparison's.
    """
    folder, written = Path(folder), json.loads(json.dumps(config.as_dict()))
    base = _read(folder / BASE / f"{split}.json", "dial", "judges")
    if base is None:
        raise QAdapterError(f"{folder}: nothing is measured on the {split} split")
    require_same(written, folder)
    heard = {
        kind: {name for name, judge in judges.items() if trusted(judge)}
        for kind, judges in base["judges"].items()
    }
    results = [Result(Row(BASE, None, ()), [], [_hear(base, heard)])]
    for row in config.rows():
        found = [
            (_read(where / TRAINING_NAME, "seed"), _read(where / f"{split}.json", "dial"))
            for where in (run_folder(folder, row.name, seed) for seed in row.seeds)
        ]
        found = [(t, run) for t, run in found if run and (t or not row.method.trained)]
        if found:
            trainings, runs = zip(*found, strict=True)
            runs = [_hear(run, heard) for run in runs]
            results.append(Result(row, [t for t in trainings if t], runs))
    touched = folder / TOUCHED_NAME
    lines = split_lines(read_text(touched)) if touched.is_file() else []
    touches = []
    for number, line in enumerate(filter(None, lines), 1):
        with _damaged(f"{touched}:{number}"):
            touches.append(opened(parse_json(line, "the line")))
    return Comparison(config.title, split, results, written, base["judges"], touches)


def _hear(run: dict[str, Any], judges: dict[str, set[str]]) -> dict[str, Any]:
    """A run with what these judges say of its answers, and no others."""
    dial = [
        {**point, "answers": {
            kind: {**found, "judged": {
                name: said for name, said in found["judged"].items() if name in judges[kind]
            }} for kind, found in point["answers"].items()
        }} for point in run["dial"]
    ]
    return {**run, "dial": dial}


def _at(runs: list[dict[str, Any]], strength: float, measure: Measure) -> Spread | None:
    found = [
        measure(run, point) for run in runs for point in run["dial"]
        if point["strength"] == strength
    ]
    return spread(x for x in found if x is not None)


def spread(found: Iterable[tuple[float, list[float] | None]]) -> Spread | None:
    """Mean and standard deviation over seeds, and the mean interval; None for nothing."""
    found = [(x, ci) for x, ci in found if x is not None and math.isfinite(x)]
    if not found:
        return None
    values, intervals = [x for x, _ in found], [ci for _, ci in found if ci]
    low = high = None
    if len(intervals) == len(found):
        low, high = (statistics.fmean(ci[i] for ci in intervals) for i in (0, 1))
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, low, high)


def _read(path: Path, *needed: str) -> dict[str, Any] | None:
    """A finished step's results, with what is ``needed`` of them; None where there are none.

    Raises:
        QAdapterError: they are not what was written.
    """
    if not path.is_file():
        return None
    with _damaged(path):
        found = opened(parse_json(read_text(path), path, line=1, surrogates=True))
        if not all(name in found for name in needed):
            raise QAdapterError(f"it holds no {' and '.join(needed)}")
        return found


@contextlib.contextmanager
def _damaged(where: object) -> Iterator[None]:
    try:
        yield
    except QAdapterError as error:
        raise QAdapterError(
            f"{where} is damaged ({error}): delete it, and what it held is measured again"
        ) from error


# --- measures -----------------------------------------------------------------------------------


def preference(kind: str, name: str) -> Measure:
    """One of ``PreferenceResult``'s numbers, at the trained policy."""

    def number(run, point):
        found = run["preferences"].get(kind, {})
        return None if found.get(name) is None else (found[name], found.get(f"{name}_ci"))

    return number


def policy_accuracy(kind: str) -> Measure:
    """Accuracy by log-probability, mean a token: of the policy, or of the base itself."""

    def number(run, point):
        side = "base" if point["strength"] == 0 else "policy"
        return preference(kind, f"preference_accuracy_{side}_mean")(run, point)

    return number


def old_margins(run: dict[str, Any]) -> np.ndarray | None:
    """By how much a run's trained policy prefers the preferred answer of each held-out old pair:
    mean log-probability a token of one minus that of the other [P], NaN where it is no number; None
    where there is no old preference, or results were written before this was kept."""
    found = run["preferences"].get("old", {}).get("policy_margins")
    return None if found is None else np.array(found, float)


def retention(texts: str, name: str) -> Measure:
    """One of ``RetentionResult``'s numbers on one of the sets of texts."""

    def number(run, point):
        found = point["retention"][texts]
        return None if found.get(name) is None else (found[name], found.get(f"{name}_ci"))

    return number


def answers(kind: str, *keys: str) -> Measure:
    """A number about the sampled answers to prompts of one kind."""

    def number(run, point):
        found = point["answers"].get(kind)
        for key in keys:
            found = (found or {}).get(key)
        return None if found is None else (found, None)

    return number


def judged(kind: str, name: str, judge: str | None = None) -> Measure:
    """"gain" or "win_rate" over the base by one judge, or the mean of all that are trusted; its
    interval is the mean of theirs."""

    def number(run, point):
        by_judge = point["answers"].get(kind, {}).get("judged", {})
        found = [x for key, x in by_judge.items() if judge in (None, key)]
        found = spread((x[name], x.get(f"{name}_ci")) for x in found if x.get(name) is not None)
        if found is None:
            return None
        return found.mean, None if found.low is None else [found.low, found.high]

    return number
