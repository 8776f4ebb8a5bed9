"""Scripts that run as the processes of one launch, and what each of them found.

A script names its checks and calls ``report``; its test starts it with ``run_ranks``. One launch
does all the checks there are for a number of processes.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import imports
import torch
from torch import distributed

from qadapter.system.processes import leave_group

TIMEOUT_SECONDS = 90
"""Of a collective that not all processes have come to."""


def environments(world_size: int) -> list[dict[str, str]]:
    """What each process of a launch finds in its environment, by rank."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
         "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        for rank in range(world_size)
    ]


def launch(script: Path, world_size: int, *arguments: object) -> None:
    """Run a script as all processes of a launch. They are forked from one that has imported what
    they need, which takes the processor longer than most of what they do.

    Raises:
        AssertionError: one of them fails; with what it printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(imports.names())
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when torch is imported
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(world_size)]
        processes = [
            context.Process(
                target=_run, args=(script, [str(x) for x in arguments], environment, output)
            )
            for environment, output in zip(environments(world_size), outputs, strict=True)
        ]
        for process in processes:
            process.start()
        try:
            for process, output in zip(processes, outputs, strict=True):
                process.join(5 * TIMEOUT_SECONDS)
                assert process.exitcode == 0, output.read_text()[-6000:]
        finally:
            for process in processes:
                process.kill()


def _run(script: Path, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    with open(output, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ |= environment
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def run_ranks(script: Path, folder: Path, world_size: int) -> list[dict[str, str | None]]:
    """{check: None, or what went wrong} of each process, as ``report`` wrote them."""
    launch(script, world_size, folder)
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
