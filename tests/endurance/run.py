"""``make endurance``: kill, cut and feed qadapter for an hour, on a tiny model.

    python tests/endurance/run.py                            all of it, into a JSON file
    python tests/endurance/run.py --kills 100 --together 0 --cuts 0 --kernels 0 --inputs 0
                                                             some of it
    python tests/endurance/run.py --trial kills:head:17      one again, alone; says what it did

A trial is told by its name alone: what is killed, cut or generated comes from it.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "TRITON_INTERPRET": "1",
}
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / name) for name in (".", "compare", "kernels", "endurance")]

import cuts  # noqa: E402
import forks  # noqa: E402
import generated  # noqa: E402
import kills  # noqa: E402
import together  # noqa: E402
from trials import Kind, Runner, Verdict  # noqa: E402

from qadapter.console.environment import devices, versions  # noqa: E402

KINDS = {
    "kills": Kind(kills.SHARES, kills.Undisturbed.of, kills.trial),
    "together": Kind(together.SHARES, together.prepare, together.trial),
    "cuts": Kind(cuts.SHARES, cuts.undisturbed, cuts.trial),
    "inputs": Kind(generated.SHARES, generated.prepare, generated.trial),
    "kernels": Kind(
        generated.KERNEL_SHARES, generated.prepare_kernels, generated.kernel_trial
    ),
}
RESULTS = TESTS.parent / "benchmarks" / "results" / "endurance.json"


def main(argv: list[str] | None = None) -> int:
    """Run trials, write what they found; 1 if anything is wrong."""
    options = _options().parse_args(argv)
    forks.warm()
    # Not a TemporaryDirectory: every fork would remove it when it ends.
    work = Path(tempfile.mkdtemp(prefix="endurance-", dir=options.work))
    try:
        runner = Runner(KINDS, work, options.workers)
        if options.trial:
            verdicts = [runner.one(name) for name in options.trial]
            for verdict in verdicts:
                _tell(verdict)
        else:
            verdicts = _run_all(runner, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return int(any(v.wrong for v in verdicts))


def _run_all(runner: Runner, options: argparse.Namespace) -> list[Verdict]:
    start, verdicts = time.monotonic(), []
    for verdict in runner.many(_plan(options, start)):
        verdicts.append(verdict)
        if verdict.wrong:
            _tell(verdict)
        if len(verdicts) % 100 == 0:
            print(f"{len(verdicts)} trials in {(time.monotonic() - start) / 60:.1f} minutes",
                  flush=True)
    found = summary(verdicts, options, time.monotonic() - start)
    print(json.dumps({k: found[k] for k in ("trials", "minutes", "processor_minutes")}, indent=1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return verdicts


def _tell(verdict: Verdict) -> None:
    print(f"{verdict.name}: {verdict.how}\n  {verdict.wrong or 'holds'}", flush=True)


def _plan(options: argparse.Namespace, start: float) -> Iterator[str]:
    """Names of trials until time is up: as many of each as asked for, mixed, so that a run that
    time ends has tried all kinds alike."""
    counts = {"kills": options.kills, "together": options.together, "cuts": options.cuts,
              "kernels": options.kernels, "inputs": options.inputs or 0}
    kinds = {name: kind.only(options.only) for name, kind in KINDS.items()}
    counts = {name: n for name, n in counts.items() if kinds[name].shares}
    more = options.inputs is None and "inputs" in counts
    names = {name: kinds[name].names(name, options.seed) for name in counts}
    mixed = sorted(((i + 0.5) / n, kind) for kind, n in counts.items() for i in range(n))
    rest = itertools.repeat("inputs") if more else ()
    for kind in itertools.chain((kind for _, kind in mixed), rest):
        if time.monotonic() - start > 60 * options.minutes:
            return
        yield next(names[kind])


def summary(
    verdicts: list[Verdict], options: argparse.Namespace, seconds: float
) -> dict[str, object]:
    """What is committed: how many trials of what, all that was wrong, and where it ran."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    scenarios: dict[str, list[Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        scenarios[verdict.name.rsplit(":", 1)[0]].append(verdict)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": options.seed, "minutes": round(seconds / 60, 1),
        "processor_minutes": round((used.ru_utime + used.ru_stime) / 60, 1),
        "workers": options.workers, "machine": platform.machine(), "cores": os.cpu_count(),
        "devices": devices(), "versions": versions(),
        "trials": {
            scenario: {
                "trials": len(found), "wrong": sum(v.wrong is not None for v in found),
                "seconds, median": round(statistics.median(v.seconds for v in found), 2),
            }
            for scenario, found in sorted(scenarios.items())
        },
        "wrong": [
            {"trial": v.name, "how": v.how, "what": v.wrong} for v in verdicts if v.wrong
        ],
    }


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--kills", type=int, default=1000, metavar="N")
    options.add_argument("--together", type=int, default=200, metavar="N")
    options.add_argument("--cuts", type=int, default=5000, metavar="N")
    options.add_argument("--inputs", type=int, metavar="N",
                         help="default: as many as --minutes leave time for")
    options.add_argument("--kernels", type=int, default=1000, metavar="N")
    options.add_argument("--minutes", type=float, default=60, metavar="M",
                         help="no trial begins later")
    options.add_argument(
        "--only", nargs="+", metavar="SCENARIO", help="none but these, such as streamed merged",
        choices=[scenario for kind in KINDS.values() for scenario in kind.shares],
    )
    options.add_argument("--seed", type=int, default=0, help="the first of each scenario's seeds")
    options.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    options.add_argument("--work", type=Path, metavar="FOLDER",
                         help="for temporary files (a GiB); default: the system's")
    options.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options.add_argument("--trial", nargs="+", metavar="KIND:SCENARIO:SEED")
    return options


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # modules that were imported and never used have complaints at an exit
