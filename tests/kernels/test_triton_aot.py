"""Every Triton kernel, compiled ahead of time for every target without a GPU: nothing spills.

The compiler runs in a process of its own, because this one interprets (see ``interpreter``). It
compiles one launch of every kernel; ``benchmarks/triton_resources.py`` compiles them all and writes
the table that the other tests here hold against the code. ``triton_versions.sh`` runs this file
under every minor version of Triton that is served.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import interpreter  # noqa: F401  first: it decides how triton is imported
import pytest

import qadapter_kernels.triton as backend_module

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "triton_resources.py"
TABLE = ROOT / "benchmarks" / "results" / "triton_resources.json"
TARGETS = {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}
ONE_OF_EACH = (
    "^soft_value forward, bf16, split, statistics|^soft_value backward, bf16, two"
    "|^rows, fp32 to bf16, base, statistics|^bradley_terry .*next|^combine_logits, strength"
    "|^sample, fp32|^scores, softcap"
)


def kernels() -> set[str]:
    """Names of the kernels in the source, per module: module.name."""
    found = set()
    for info in pkgutil.iter_modules(backend_module.__path__):
        module = importlib.import_module(f"{backend_module.__name__}.{info.name}")
        found |= {
            f"{info.name}.{name.strip('_')}" for name, value in inspect.getmembers(module)
            if name.endswith("_kernel") and hasattr(value, "arg_names")
        }
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    process = subprocess.run(
        [sys.executable, SCRIPT, "--only", ONE_OF_EACH, "--output", "-"],
        env=environment, capture_output=True, text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


def check_resources(report: dict) -> None:
    for row in report["rows"]:
        assert row["spills"] == 0, row
        if row["target"].startswith("cuda"):
            assert row["registers"] * row["threads"] <= 65_536, row  # else it can't be launched
            assert row["shared"] <= 48 << 10, row


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_without_spills(report):
    assert set(report["targets"]) >= TARGETS - {"hip:gfx942"}  # Triton 3.4 needs ROCm's linker
    assert {(row["kernel"], row["target"]) for row in report["rows"]} == {
        (kernel, target) for kernel in kernels() for target in report["targets"]
    }
    check_resources(report)


def test_the_committed_table_is_complete_and_has_no_spills():
    table = json.loads(TABLE.read_text())
    assert set(table["targets"]) == {row["target"] for row in table["rows"]} == TARGETS
    assert {row["kernel"] for row in table["rows"]} == kernels()
    per_case = {(row["case"], row["kernel"]) for row in table["rows"]}
    assert len(table["rows"]) == len(per_case) * len(TARGETS)
    check_resources(table)
    for row in table["rows"]:
        if row["case"].startswith("soft_value") and "statistics" not in row["case"]:
            # Four programs fit, as launch.TILES wants it: AMD's lanes have 512 registers.
            assert row["registers"] <= (64 if row["target"].startswith("cuda") else 128), row


def test_the_committed_table_is_what_the_code_compiles_to(report):
    """With the table's version of Triton the numbers are the same, so the table is not stale."""
    table = json.loads(TABLE.read_text())
    if report["triton"] != table["triton"]:
        pytest.skip(f"the table was made with Triton {table['triton']}")
    committed = {(row["case"], row["kernel"], row["target"]): row for row in table["rows"]}
    for row in report["rows"]:
        assert committed[row["case"], row["kernel"], row["target"]] == row
