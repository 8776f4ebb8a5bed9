"""A whole comparison into one folder, resumable.

    config.json            the configuration and the files' hashes; a later run must agree
    first/, first.json     the base with what it learned first, if the comparison asks for that
    base/SPLIT.json        the base as it is
    NAME/seed-K/           the adapter, training.json, and SPLIT.json once it is measured
    base_answers/          the base's own draws, sampled once
    test_touched.jsonl     a line for every time that a run was scored on the test split

A file is written whole when its step is done: a killed run continues with the next step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from qadapter.compare.config import (
    BASE,
    CONFIG_NAME,
    SPLITS,
    TOUCHED_NAME,
    CompareConfig,
    Row,
    folder_name,
)
from qadapter.compare.kinds import BestOfN, Interpolated, Method, OfAnother, Prompted, Reversed
from qadapter.compare.measure import evaluate, evaluate_row, probe, trusted
from qadapter.compare.methods import require_trl, reversed_head, train
from qadapter.compare.reading import changes, fingerprint_files
from qadapter.compare.workbench import Workbench
from qadapter.errors import QAdapterError, nearest
from qadapter.evaluation.judges import pair_accuracy, preference_texts
from qadapter.evaluation.report import format_value, write_json
from qadapter.policy import storage
from qadapter.policy.model import QAdapterModel
from qadapter.system.documents import parse_json
from qadapter.system.locking import RUN_LOCK_NAME, lock_of, remove_stale, sole_run
from qadapter.system.scratch import remove_abandoned
from qadapter.system.sealed import sealed
from qadapter.system.textfiles import read_text
from qadapter.training.own_samples import Sample
from qadapter.trunk.base_dtype import dtype_of

TRAINING_NAME = "training.json"


def run_comparison(
    config: CompareConfig, folder: str | Path, *, split: str = "validation",
    only: Collection[str] | None = None, environment: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train and measure whatever is not there yet.

    Args:
        folder: of the results; made, or continued.
        split: what finished runs are measured on. "validation" is for choosing; "test" is recorded
            as touched, and measures what is trained already or trains it; sweeps are left out.
        only: names of the rows to run; the others are left as they are. Several processes, on one
            machine or on a folder they share, can so run one comparison: the first one alone until
            the base is measured, then each its own rows.
        environment: versions and machine, kept with every result.
        say: gets a line a step.

    Raises:
        QAdapterError: the folder holds a comparison of another configuration (what changed is
            named); anything the configuration names that can't be used; an unknown row.
    """
    if split not in SPLITS:
        raise QAdapterError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    folder = Path(folder).expanduser()
    # Sweeps are for choosing by.
    rows = [row for row in config.rows() if split == "validation" or row.sweep is None]
    if only is not None:
        known = [row.name for row in rows]
        for name in only:
            if name not in known:
                raise QAdapterError(f"only: no row of the {split} split is called {name!r}"
                                    + nearest(name, known))
        rows = [row for row in rows if row.name in only]
    written = {**config.as_dict(), "files_sha256": fingerprint_files(config)}
    _require_ours(written, folder)
    for place in (folder, *folder.glob("*/"), *folder.glob("*/*/")):
        remove_abandoned(place)
        remove_stale(lock_of(place))
    todo = [
        (row, seed) for row in rows for seed in row.seeds
        if not (run_folder(folder, row.name, seed) / f"{split}.json").is_file()
    ]
    base_file = folder / BASE / f"{split}.json"
    if not todo and base_file.is_file():
        _claim(written, folder)
        say(f"everything is measured on the {split} split already")
        return folder
    to_train = list(_to_train(config, folder, todo))
    require_trl(to_train)
    # From then on several processes may work on it, each at its own rows.
    first = contextlib.nullcontext() if base_file.is_file() else _alone(folder)
    with first:
        bench = Workbench(config, folder, say)
        # Not before all is read: a name that was mistyped must not claim the folder.
        _claim(written, folder)
        bench.learn_first()
        environment = {**(environment or {}), "dtype": dtype_of(bench.loaded.model)}
        asked = [row.method for row, _ in todo if isinstance(row.method, Prompted)]
        _prepare(bench, base_file, split, [*asked, *to_train], environment, say)
    for number, (row, seed) in enumerate(todo, 1):
        told = f"[{number}/{len(todo)}] {row.name}, seed {seed}"
        _measure(bench, row, seed, folder, split, environment, lambda x, t=told: say(f"{t}: {x}"))
    return folder


def _prepare(
    bench: Workbench, base_file: Path, split: str, methods: Iterable[Method],
    environment: dict[str, Any], say: Callable[[str], None],
) -> None:
    """What all rows share: the data is told, prompts are looked at, the base is measured.

    Args:
        methods: that are to be trained, or ask.
    """
    for kind, data in bench.kinds.items():
        say(f"{kind} preference: {data.summary}")
        say(f"{kind} preference: " + ", ".join(
            f"{name} {len(getattr(data, name).tokens):,}"
            for name in ("train", "validation", "test", "judge")
        ) + " pairs")
    for method in methods:
        if isinstance(method, Prompted):
            bench.check_prompted(method)
        else:
            bench.check_adapter(method)
    if not base_file.is_file():
        say("measuring the base")
        found = evaluate(bench, bench.fresh, split, [0.0], bench.config.evaluation.seed)
        judges = _judges(bench, split)
        for kind, found_by in judges.items():
            for name, judge in found_by.items():
                say(f"{kind} preference, judge by {name}: accuracy "
                    f"{format_value(judge['accuracy'])} on held-out pairs"
                    f"{'' if trusted(judge) else ', not used'}")
        write_json(base_file, sealed({
            "name": BASE, **found, "judges": judges, "environment": environment,
        }))


def _measure(
    bench: Workbench, row: Row, seed: int, folder: Path, split: str, environment: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Train a run if need be, and measure it."""
    where = run_folder(folder, row.name, seed)
    with _alone(where):
        if (where / f"{split}.json").is_file():
            return  # another process has just done it
        model = _model(bench, row, seed, folder, environment, say)
        start = time.perf_counter()
        found = evaluate_row(bench, model, row, split, seed)
        if split == "test":
            _record_touch(folder, row.name, seed)
        write_json(where / f"{split}.json", sealed({
            "name": row.name, "seed": seed, **found, "seconds": time.perf_counter() - start,
            "environment": environment,
        }))
        say(f"measured in {time.perf_counter() - start:.0f} s")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process is at this part of the comparison meanwhile; several may be at others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QAdapterError(f"{folder} can't be written: {error}") from error
    try:
        with sole_run(folder):
            yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing came of it


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Where one run's files are."""
    return folder / folder_name(name) / f"seed-{seed}"


def _is_trained(where: Path) -> bool:
    """Who keeps results under version control may leave the weights out: it trains again then, as
    it does where they are not what was saved."""
    return (where / TRAINING_NAME).is_file() and storage.is_whole(where)


def _to_train(
    config: CompareConfig, folder: Path, todo: Iterable[tuple[Row, int]]
) -> Iterator[Method]:
    """The methods that runs still have to be trained by; of what is made of another row, that
    row's too."""
    for row, seed in todo:
        name, method = row.name, row.method
        while not (method.trained and _is_trained(run_folder(folder, name, seed))):
            if method.trained:
                yield method
            if not isinstance(method, OfAnother):
                break
            name, method = method.of, config.methods[method.of]


def _model(
    bench: Workbench, row: Row, seed: int, folder: Path, environment: dict[str, Any],
    say: Callable[[str], None],
) -> QAdapterModel:
    """The run's model: loaded if it was trained and its weights are here, else trained now; of
    what is not trained, made of what there is."""
    if isinstance(row.method, Prompted):
        return bench.fresh

    def of_another() -> QAdapterModel:
        of = next(r for r in bench.config.rows() if r.name == row.method.of)
        return _model(bench, of, seed, folder, environment, say)

    if isinstance(row.method, Reversed):
        return reversed_head(of_another())
    if isinstance(row.method, Interpolated):
        return of_another()
    where = run_folder(folder, row.name, seed)
    with _alone(where):
        if _is_trained(where):
            return bench.load(row.method, where)
        best = None
        if isinstance(row.method, BestOfN):
            best = bench.best_answers(of_another(), row.method.n)
        return _trained(bench, row, seed, where, best, environment, say)


def _trained(
    bench: Workbench, row: Row, seed: int, where: Path, best: list[Sample] | None,
    environment: dict[str, Any], say: Callable[[str], None],
) -> QAdapterModel:
    known = (where / TRAINING_NAME).is_file()
    say("its weights are not here, or not whole: training again" if known else "training")
    trained = train(bench, row.method, seed, lambda model: probe(bench, model), best)
    trained.model.save_pretrained(where)
    facts = trained._asdict()
    del facts["model"]
    write_json(where / TRAINING_NAME, sealed({
        "name": row.name, "seed": seed, "method": row.method.kind,
        "options": dataclasses.asdict(row.method), "sweep": row.sweep, "value": row.value,
        "trainable_parameters": sum(
            p.numel() for p in trained.model.parameters() if p.requires_grad
        ),
        "budget_tokens": round(bench.budget), **facts, "environment": environment,
    }))
    say(f"{trained.steps} steps, {trained.tokens:,} tokens in {trained.seconds:.0f} s "
        f"({trained.processor_seconds:.0f} processor seconds), {trained.trained_by}")
    return trained.model


def _judges(bench: Workbench, split: str) -> dict[str, Any]:
    """How far each judge can be trusted: its accuracy on pairs of the split."""
    if bench.config.evaluation.prompts == 0:
        return {kind: {} for kind in bench.kinds}
    return {
        kind: {
            judge.name: pair_accuracy(
                judge, preference_texts(getattr(bench.kinds[kind], split).pairs, bench.tokenizer)
            ).as_dict("accuracy")
            for judge in judges
        }
        for kind, judges in bench.judges.items()
    }


def _require_ours(written: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What config.json is to hold, if the folder is free or this comparison's."""
    if (folder / CONFIG_NAME).is_file():
        before = require_same(written, folder)
        # What was run once stays known: a method that comes back must be what it was.
        return written | {key: before[key] | written[key] for key in ("methods", "sweeps")}
    if folder.is_dir() and any(path.name != RUN_LOCK_NAME for path in folder.iterdir()):
        raise QAdapterError(f"{folder} is not empty and holds no comparison: choose another folder")
    return written


def _claim(written: dict[str, Any], folder: Path) -> None:
    """Take the folder for this comparison. Looked at again: another process may have added rows."""
    found = _require_ours(written, folder)
    try:
        write_json(folder / CONFIG_NAME, found)
    except OSError as error:
        raise QAdapterError(f"{folder} can't be written: {error}") from error


def require_same(written: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration in a results folder.

    Args:
        written: the one asked for, as ``CompareConfig.as_dict`` gives it, with or without the
            hashes of files.

    Raises:
        QAdapterError: they are not the same comparison's; what changed is named.
    """
    path = folder / CONFIG_NAME
    before = parse_json(read_text(path), path, line=1, surrogates=True)
    if not isinstance(before, dict) or not {"methods", "sweeps"} <= before.keys():
        raise QAdapterError(f"{path} is no comparison's: choose another output_dir")
    known = {k: v for k, v in before.items() if k != "files_sha256" or k in written}
    if changed := changes(known, json.loads(json.dumps(written))):
        raise QAdapterError(
            f"{folder} holds a comparison with another configuration: {'; '.join(changed)}. "
            "Choose another output_dir, or put it back"
        )
    return before


def _record_touch(folder: Path, name: str, seed: int) -> None:
    """The test split is for once: whoever scores a run on it again can be seen to."""
    touch = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "name": name, "seed": seed}
    with (folder / TOUCHED_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(sealed(touch)) + "\n")
