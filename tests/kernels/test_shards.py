"""A head whose rows are shared out over 2 and 4 processes gives what one process gives."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from shards_run import checks_of

from qadapter_kernels.shards import Collectives

SCRIPT = Path(__file__).with_name("shards_run.py")
DOCS = Path(__file__).parents[2] / "docs/scale.md"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of a world size found, started once: {check: [None or an error, a rank]}."""

    @functools.cache
    def run(world_size: int) -> dict[str, list[str | None]]:
        folder = tmp_path_factory.mktemp(f"shards{world_size}")
        ranks = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder), str(rank), str(world_size)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(world_size)
        ]
        try:
            for rank in ranks:
                output, _ = rank.communicate(timeout=300)
                assert rank.returncode == 0, output
        finally:
            for rank in ranks:
                rank.kill()
        each = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
        return {
            check: [rank.get(check, "not reached") for rank in each]
            for check in checks_of(world_size)
        }

    return run


@pytest.mark.parametrize(("world_size", "check"), [
    pytest.param(size, check, marks=[pytest.mark.slow] if size > 2 else [])
    for size in (2, 4) for check in checks_of(size)
])
def test_of_the_shards(found, world_size, check):
    for rank, error in enumerate(found(world_size)[check]):
        assert error is None, f"rank {rank} of {world_size}: {error}"


def test_the_estimate_that_the_docs_show():
    states, hidden, vocab, flops = 4_096, 4_096, 128_256, 690e12
    sent = Collectives.of(states, hidden)
    lines = DOCS.read_text().split("<!-- vocabulary-parallel -->")[1].split("<!-- end -->")[0]
    rows = [line.split("|")[1:-1] for line in lines.strip().splitlines()[2:]]
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 64]
    for ranks, *shown in rows:
        ranks = int(ranks)
        products = 4 * states * hidden * vocab / flops / ranks
        speed = {"bandwidth": 400e9, "latency": 25e-6} if ranks <= 8 else {
            "bandwidth": 200e9, "latency": 50e-6
        }
        reduces = sent.seconds(ranks, **speed)
        expected = [f"{1e3 * products:.2f}", f"{1e3 * reduces:.2f}",
                    f"{products / (products + reduces):.0%}"]
        assert [cell.strip() for cell in shown] == expected
