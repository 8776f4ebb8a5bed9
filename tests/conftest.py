"""What every test shares: seeds, Hypothesis settings, threads, the GPU marker.

No ``__init__.py`` here or below: this folder and each test's own are on ``sys.path``, so helpers
are imported by their bare names (``from oracle import ...``, ``from cases import ...``).
"""

from __future__ import annotations

import os

import imports
import pytest
import torch
from hypothesis import settings

# The same examples in every run: a test that fails on Tuesdays helps nobody.
settings.register_profile("qadapter", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("qadapter")

# Here and not later: some test module's imports reach triton (torch._dynamo does), and whether its
# kernels compile or run in its interpreter is settled when it is imported (interpreter.py).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # the workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_finish(session):
    """Every run of a Trainer begins with a full collection. What a worker with tests of every kind
    comes to import may as well be there before the first."""
    if WORKER and len(session.items) > 1_000:
        imports.import_all()
    imports.leave_to_stay()


def pytest_addoption(parser):
    parser.addoption(
        "--first-case", action="store_true",
        help="of each parametrized test its first case alone: for what tells versions apart",
    )


@pytest.hookimpl(trylast=True)  # of those that -m has left
def pytest_collection_modifyitems(config, items):
    if config.getoption("first_case"):
        first = {}
        for item in items:
            first.setdefault((item.path, item.getparent(pytest.Class), item.originalname), item)
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = first.values()
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
