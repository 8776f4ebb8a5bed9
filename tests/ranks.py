"""Scripts that run as the processes of one launch, and what each of them found.

A script names its checks and calls ``report``; its test starts it with ``run_ranks``. Starting a
process costs seconds, so one launch does all the checks there are for a number of processes.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from qadapter.system.processes import leave_group

TIMEOUT_SECONDS = 90
"""Of a collective that not all processes have come to."""


def run_ranks(script: Path, folder: Path, world_size: int) -> list[dict[str, str | None]]:
    """{check: None, or what went wrong} of each process, as ``report`` wrote them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={
                **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=5 * TIMEOUT_SECONDS)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def started_once(script: Path, new_folder: Callable[[str], Path]) -> Callable[[int], list]:
    """``run_ranks`` of a script by world size, each started when it is first asked for."""
    return functools.cache(lambda size: run_ranks(script, new_folder("ranks"), size))


def report(checks: Mapping[str, Callable[[], None]], folder: Path) -> None:
    """Run all checks as one process of a launch."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    found: dict[str, str | None] = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        file = folder / f"rank{distributed.get_rank()}.json"
        file.write_text(json.dumps(found))
    leave_group()


def alike(x: object) -> bool:
    """Whether all processes have the same."""
    theirs = [None] * distributed.get_world_size()
    distributed.all_gather_object(theirs, x)
    return all(y == x for y in theirs)
