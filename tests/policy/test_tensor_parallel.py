"""A base that tensor parallelism splits over 2 and 4 processes is the base, whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import started_once
from tensor_parallel_run import checks_of

SCRIPT = Path(__file__).with_name("tensor_parallel_run.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return started_once(SCRIPT, tmp_path_factory.mktemp)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "check"), [
    (size, check) for size in (2, 4) for check in checks_of(size)
])
def test_split_base(found, world_size, check):
    for rank, errors in enumerate(found(world_size)):
        assert errors[check] is None, f"rank {rank} of {world_size}: {errors[check]}"
