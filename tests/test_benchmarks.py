"""The benchmarks run, compute the same thing, and write what they say. No times are judged."""

# ruff: noqa: E402  (the scripts' folder has to be on the path first)

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.exists():
    pytest.skip("tests of a checkout, and this is an installed copy", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import decoding
import harness
import hidden_level
import linear_loss
import logits_loss
import scaling
import served_by
import training_step
from harness import Case, Timing, Unavailable

from qadapter.commands import bench
from qadapter_kernels import dispatch

PEERS = ("eager, authors", "eager, one product", "TRL chunked log-prob")


def run(main, folder: Path, *arguments: str) -> list[dict]:
    main(["--dry-run", "--device", "cpu", "--output", str(folder), *arguments])
    (lines,) = folder.glob("*.jsonl")
    assert [path.suffix for path in folder.glob("*.png")] == [".png"]
    return [json.loads(line) for line in lines.read_text().splitlines()]


@pytest.mark.slow
def test_linear_loss(tmp_path, capsys):
    rows = run(linear_loss.main, tmp_path, "--no-memory", "--dtype", "bfloat16", "--rows", "34",
               "--providers", "ours", *PEERS, "cut-cross-entropy")
    done = {(r["provider"], r["mode"], r["base"]): r for r in rows if r["status"] == "ok"}
    assert {mode for _, mode, _ in done} == set(linear_loss.MODES)
    assert done["products alone", "both", "cached"]["percent_of_products"] == pytest.approx(100)
    assert done["ours", "both", "computed"]["times_ours"] == pytest.approx(1)
    assert ("eager, authors", "both", "cached") not in done
    for row in rows:
        assert row["environment"]["torch"] == torch.__version__
        assert (row["kernel"], row["dtype"], row["device"]) == ("linear_loss", "bfloat16", "cpu")
        assert row["shape"] == {"head": "tiny", "N": 34, "vocab": 1031, "hidden": 64}
    refused = [r for r in rows if r["provider"] == "cut-cross-entropy"]
    assert len(refused) == 6 and all(
        "GPU" in r["status"] or "not installed" in r["status"] for r in refused
    )
    assert "not run: cut-cross-entropy: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ours", "ours (torch)", *PEERS])
@pytest.mark.parametrize("cached", [False, True])
def test_everybody_computes_the_same_loss(name, cached):
    """In float32, where all agree to rounding; bfloat16 would hide a wrong formula."""
    provider = hidden_level.providers("cpu")[name]
    if cached and not provider.cacheable:
        pytest.skip("takes no cached base")
    x = hidden_level.make_inputs(harness.HEADS["tiny"], 40, torch.float32, "cpu", cached)
    found = hidden_level.errors(provider.loss, x, hidden_level.exact(x, block=16))
    assert found["loss_error"] < 1e-4 and found["gradient_error"] < 1e-4


def test_liger_computes_the_same_loss():
    loss = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    x = hidden_level.make_inputs(harness.HEADS["tiny"], 41, torch.float32, "cpu", False)

    class Uncompiled(loss):
        def __init__(self, **options):
            super().__init__(**options, compiled=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("liger_kernel.chunked_loss.LigerFusedLinearDPOLoss", Uncompiled)
        found = hidden_level.errors(hidden_level.liger, x, hidden_level.exact(x))
    assert found["loss_error"] < 1e-4 and found["gradient_error"] < 1e-4


def test_one_row_and_uneven_sequences():
    for rows in (1, 41, 1029):
        x = hidden_level.make_inputs(harness.HEADS["tiny"], rows, torch.float32, "cpu", False)
        assert x.offsets[-1] == rows == len(x.sequences)
        assert torch.isfinite(hidden_level.ours(x))


def test_logits_loss(tmp_path):
    rows = run(logits_loss.main, tmp_path, "--providers", "ours", "eager")
    copies = [r for r in rows if r["provider"] == "copy"]
    assert all(r["percent_of_copy"] == pytest.approx(100) for r in copies) and copies
    for row in rows:
        if row["provider"] != "copy":
            assert row["loss_error"] < 1e-3 and row["gradient_error"] < 4e-3


def test_scaling(tmp_path):
    rows = run(scaling.main, tmp_path)
    assert {r["axis"] for r in rows} == {"N", "V", "fit"}
    assert [sweep["axis"] for sweep in rows[-1]["sweeps"]] == ["N", "V"]


def test_fit_finds_a_line_and_a_power():
    line = scaling.fit({x: 3.0 + 0.5 * x for x in (10, 20, 40)})
    assert line["fixed_ms"] == pytest.approx(3) and line["ms_per_1000"] == pytest.approx(500)
    assert line["r_squared"] == pytest.approx(1)
    square = scaling.fit({x: float(x * x) for x in (1, 2, 4, 8)})
    assert square["exponent"] == pytest.approx(2) and square["per_unit_spread"] == pytest.approx(8)


def test_decoding(tmp_path):
    rows = run(decoding.main, tmp_path)
    assert {r["mode"] for r in rows} == set(decoding.SETTINGS)
    a, b = decoding.make_logits(1031, 3, torch.bfloat16, "cpu")
    torch.testing.assert_close(
        decoding.combine_fused(a, b), decoding.combine_eager(a, b), atol=1e-4, rtol=1e-5
    )


def test_who_serves_is_seen_and_not_only_said(monkeypatch, capsys):
    first = dispatch.default("cpu").NAME
    rows = {said.operator: (seen, problem)
            for said, seen, problem in served_by.observe("cpu", torch.float32)}
    assert rows.pop("sample") == ("torch", None)
    assert tuple(rows) == dispatch.OPERATORS[:-1] and {seen for seen, _ in rows.values()} == {first}

    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    assert served_by.main(["--device", "cpu"]) == 1
    assert "WRONG: soft_value: a fallback serves: QADAPTER_BACKEND" in capsys.readouterr().out


@pytest.mark.skipif(dispatch.default("cpu").NAME != "cpu", reason="the CPU library was not built")
def test_another_backend_than_said_is_a_failure(monkeypatch):
    """Dispatch that says one thing and does another."""
    monkeypatch.setattr(dispatch, "select", lambda *_: dispatch.load("torch"))
    problems = [problem for *_, problem in served_by.observe("cpu", torch.float32)]
    assert problems[:-1] == ["said to be served by cpu, seen served by torch"] * 5


def test_cases_take_turns_and_failures_are_results():
    seen = []

    def counting(name):
        return lambda: Case(lambda prepared: seen.append((name, prepared)), lambda: "ready")

    def missing():
        raise Unavailable("needs a moon")

    def failing():
        return Case(lambda _: torch.zeros(2) @ torch.zeros(3))

    found = harness.interleave(
        {"a": counting("a"), "missing": missing, "failing": failing, "b": counting("b")}, "cpu",
        budget=0.0, min_rounds=3,
    )
    assert list(found) == ["a", "missing", "failing", "b"]
    assert found["missing"] == "needs a moon" and found["failing"].startswith("RuntimeError: ")
    assert isinstance(found["a"], Timing) and found["a"].rounds == found["b"].rounds == 3
    timed = [name for name, _ in seen[2:]]  # after a warm-up each
    assert timed == ["a", "b", "b", "a", "a", "b"]
    assert all(prepared == "ready" for _, prepared in seen)


@pytest.mark.slow
def test_training_step(tmp_path, capsys):
    rows = run(training_step.main, tmp_path, "--no-memory", "--rounds", "1")
    assert [r["status"] for r in rows] == ["ok"] * 2 * len(training_step.PROVIDERS)
    assert {r["provider"] for r in rows} == set(training_step.PROVIDERS)
    for row in rows:
        recomputes = row["shape"]["T"] == 96 and "head" not in row["provider"]
        assert row["gradient_checkpointing"] == recomputes
        assert row["tokens_per_s"] == pytest.approx(
            row["shape"]["tokens"] / row["ms"] * 1e3, rel=1e-3
        )
        assert 0 <= row["loss_percent"] <= 100 and row["speedup_over_authors"] > 0
    assert "of it the loss" in capsys.readouterr().out


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "head"])
def test_training_steps_minimise_the_same_loss(kind, checkpointed):
    """In float32, with an adapter that does something: losses and gradients."""
    bench = training_step.Bench("tiny", kind, 48, "cpu", torch.float32)
    bench.set_length(48, checkpointed)
    assert bench.checkpointed == (checkpointed and kind == "lora")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bench.parameters:
            parameter.normal_(std=0.2, generator=generator)
    found = {}
    for name, step in bench.steps().items():
        with step.around():
            loss = step.loss()
            gradients = torch.autograd.grad(loss, bench.parameters)
        found[name] = loss.item(), torch.cat([g.flatten() for g in gradients])
    loss, gradient = found.pop(next(iter(found)))
    assert gradient.norm() > 0 and found
    for name, (other_loss, other_gradient) in found.items():
        assert other_loss == pytest.approx(loss, rel=1e-4), name
        assert (other_gradient - gradient).norm() < 1e-3 * gradient.norm(), name


def allocating(mebibytes: int, rows: int) -> Case:
    """Holds that much twice over, in two allocations, the first of which is gone at the end."""
    def work(_):
        for _ in range(2):
            torch.ones(mebibytes << 18)  # float32

    return Case(work if rows > harness.WARM_ROWS else lambda _: None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_what_is_held_at_once():
    found = harness.peak_extra_memory(allocating, (64,), 1000, "cpu", warm_in_full=False)
    assert math.isclose(found / harness.MEBIBYTE, 64, rel_tol=0.1)


def test_bench_command_hands_its_options_over(monkeypatch):
    calls = []

    def record(command):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1 if "scaling" in command[1] else 0)

    monkeypatch.setattr(bench.subprocess, "run", record)
    options = bench.BenchArguments(question="decoding", device="cpu", threads=2, dry_run=True)
    bench.run(options, set())
    flags = ["--budget", "20.0", "--output", "runs/bench", "--device", "cpu", "--threads", "2"]
    assert calls == [[sys.executable, str(FOLDER / "decoding.py"), *flags, "--dry-run"]]
    with pytest.raises(bench.QAdapterError, match="failed: scaling"):
        bench.run(bench.BenchArguments(), set())
    assert [Path(c[1]).stem for c in calls[1:]] == list(bench.QUESTIONS)


def gpu_script(folder: Path, python: str, parts: str) -> tuple[int, list[str]]:
    """Exit code and the script's own lines of a dry run."""
    found = subprocess.run(
        [FOLDER / "gpu.sh", "--dry-run"], capture_output=True, text=True,
        env=os.environ | {"PYTHON": python, "PARTS": parts, "OUT": str(folder)},
    )
    return found.returncode, [x for x in found.stdout.splitlines() if x.startswith("== ")]


@pytest.mark.slow
def test_gpu_script_brings_results_back(tmp_path):
    code, lines = gpu_script(tmp_path, sys.executable, "decoding")
    assert code == 0 and lines[0].startswith("== decoding")
    assert lines[-1].endswith("; failed: none")
    assert {path.name for path in tmp_path.iterdir()} == {"decoding.cpu.png", "results.tar.gz"}
    with tarfile.open(tmp_path / "results.tar.gz") as results:
        assert {"./decoding.jsonl", "log/decoding.txt"} <= set(results.getnames())


def test_gpu_script_goes_on_after_a_failing_part(tmp_path):
    code, lines = gpu_script(tmp_path, "false", "decoding scaling")
    assert code == 1 and lines[-1].endswith("; failed: decoding scaling")
    assert (tmp_path / "results.tar.gz").exists()


def test_gpu_wheels_are_the_pinned_versions():
    """What travels to a GPU machine is what was measured here."""
    pins = (FOLDER.parent / "constraints.txt").read_text().splitlines()
    pins += re.findall(r'"([\w-]+==[\w.]+)"', (FOLDER.parent / "pyproject.toml").read_text())
    wheels = (FOLDER / "gpu-wheels.txt").read_text().splitlines()
    assert {line for line in wheels if not line.startswith("#")} <= set(pins)
