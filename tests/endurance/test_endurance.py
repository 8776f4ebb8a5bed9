"""``make endurance`` in small: the same trials, with seeds that are always the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
from forks import Stop

RUN = Path(__file__).with_name("run.py")


def names(kind: str, scenarios: str, seeds: range) -> list[str]:
    return [f"{kind}:{name}:{seed}" for name in scenarios.split(", ") for seed in seeds]


SMALL = [
    *names("kills", "head, lora", range(2)),
    *names("kills", "streamed, replaced, rewritten, measured, judge", range(1)),
    *names("together", "features, two runs", range(1)),
    *names("cuts", "adapter, lora", range(3)), *names("cuts", "resume, resume from", range(2)),
    *names("cuts", "own samples, features, judged, base, export", range(1)),
    *names("inputs", "data, configurations, flags", range(6)),
    *names("kernels", "soft_value, rows", range(1)),
]


# In a process of its own: what this one holds of threads would be lost in its forks.
@pytest.mark.slow
def test_in_small(tmp_path):
    done = subprocess.run(
        [sys.executable, RUN, "--work", tmp_path, "--trial", *SMALL],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  holds\n") == len(SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_of_many_writes_what_it_found(tmp_path):
    output = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, RUN, "--work", tmp_path, "--output", output, "--kills", "0", "--cuts", "0",
         "--together", "0", "--inputs", "3", "--kernels", "1", "--seed", "100", "--workers", "2"],
        capture_output=True, text=True,
    )
    found = json.loads(output.read_text())
    assert done.returncode == 0, done.stdout
    assert {name: t["trials"] for name, t in found["trials"].items()} == {
        "inputs:configurations": 1, "inputs:data": 1, "inputs:flags": 1, "kernels:soft_value": 1,
    }
    assert found["wrong"] == [] and found["seed"] == 100 and "torch" in found["versions"]


# --- the harness itself: what it must not miss -----------------------------------------------


def write_three():
    for number in range(3):
        Path(f"file-{number}").write_bytes(b"x" * 100)


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("file-*")}


@pytest.mark.parametrize("stop, left", [
    (None, {"file-0": 100, "file-1": 100, "file-2": 100}),
    (Stop("operation", 1), {"file-0": 100}),
    (Stop("write", 2, 30), {"file-0": 100, "file-1": 100, "file-2": 30}),
])
def test_a_run_stops_where_it_is_told_to(tmp_path, stop, left):
    ended = forks.call(write_three, tmp_path, stop)
    assert written(tmp_path) == left
    assert (ended.code == 0) == (stop is None)
    assert ended.last == f"open file-{len(left) - 1}"


def work():
    while True:
        sum(range(1000))


def wait_and_work():
    time.sleep(0.3)
    Path("file-0").touch()
    work()


def test_a_moment_is_processor_time(tmp_path):
    ended = forks.call(wait_and_work, tmp_path, Stop("moment", 0.2))
    assert ended.code == -signal.SIGPROF and written(tmp_path) == {"file-0": 0}


def crash():
    raise ValueError("broken")


def shout():
    print("error: one\nerror: two", file=sys.stderr)
    sys.exit(2)


def leave():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("function, wrong", [
    (write_three, None), (crash, "traceback: ValueError: broken"), (shout, "not one line"),
    (leave, f"ended with {-signal.SIGTERM}"), (work, "hangs"),
])
def test_what_no_run_may_do_is_seen(tmp_path, monkeypatch, function, wrong):
    monkeypatch.setattr(forks, "CPU_SECONDS", 1)
    found = forks.call(function, tmp_path).wrong()
    assert found is None if wrong is None else found.startswith(wrong)
