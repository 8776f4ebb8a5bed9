"""A head whose rows are shared out over 2 and 4 processes gives what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import started_once
from shards_run import checks_of

from qadapter_kernels.shards import Collectives

SCRIPT = Path(__file__).with_name("shards_run.py")
DOCS = Path(__file__).parents[2] / "docs/scale.md"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of a world size found."""
    return started_once(SCRIPT, tmp_path_factory.mktemp)


@pytest.mark.parametrize(("world_size", "check"), [
    pytest.param(size, check, marks=[pytest.mark.slow] if size > 2 else [])
    for size in (2, 4) for check in checks_of(size)
])
def test_of_the_shards(found, world_size, check):
    for rank, errors in enumerate(found(world_size)):
        assert errors[check] is None, f"rank {rank} of {world_size}: {errors[check]}"


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
