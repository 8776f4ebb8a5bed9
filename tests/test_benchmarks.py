"""The benchmarks run, compute the same thing, and write what they say. No times are judged."""

# ruff: noqa: E402  (the scripts' folder has to be on the path first)

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.exists():
    pytest.skip("tests of a checkout, and this is an installed copy", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import decoding
import evaluation
import harness
import hidden_level
import large_data
import linear_loss
import logits_loss
import report
import scaling
import served_by
import step_cases
import summary
import training_step
from harness import Case, Timing, Unavailable

from qadapter import ObjectiveConfig, linear_q_adapter_loss
from qadapter.commands import bench
from qadapter.data import PreferenceCollator
from qadapter.trunk.packing import Packing
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


@pytest.mark.slow
@pytest.mark.parametrize("main, name, options", [
    (linear_loss.main, "torch.compile, one product", ["--no-memory"]),
    (logits_loss.main, logits_loss.COMPILED, []),
])
def test_shapes_compile_where_they_are_asked_to(tmp_path, main, name, options):
    arguments = (*options, "--rows", "5", "--providers", "ours", name, "--compile-rows")
    reasons = {(): "not compiled, as asked",
               ("4096", "512"): "not compiled but for N = 4096, 512, as asked"}
    for wanted, reason in reasons.items():
        rows = run(main, tmp_path / str(len(wanted)), *arguments, *wanted)
        status = {r["provider"]: r["status"] for r in rows}
        assert status["ours"] == "ok" and status[name] == reason


@torch.enable_grad()
def quack_stand_in(hidden, weight, target, need_dx=True, need_dw=True):
    """What quack's function of this name promises, in PyTorch: each row's loss, its gradient by the
    row's hidden state, and nothing of W's."""
    assert not need_dw
    leaf = hidden.detach().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf @ weight.t(), target, reduction="none")
    gradient = torch.autograd.grad(losses.sum(), leaf)[0] if need_dx else None
    return losses.detach(), gradient, None, None, None


@pytest.mark.parametrize("name", [
    "ours", "ours (torch)", *PEERS, "Liger scaled cross-entropy", "quack chunked",
    "torch linear_cross_entropy",
])
@pytest.mark.parametrize("cached", [False, True])
def test_everybody_computes_the_same_loss(name, cached, monkeypatch):
    """In float32, where all agree to rounding; bfloat16 would hide a wrong formula. Of Liger's,
    what serves a CPU; of quack's, what is around its kernel."""
    quack = types.SimpleNamespace(chunked_linear_cross_entropy_fwd=quack_stand_in)
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", quack)
    provider = hidden_level.providers("cpu")[name]
    if cached and not provider.cacheable:
        pytest.skip("takes no cached base")
    x = hidden_level.make_inputs(harness.HEADS["tiny"], 40, torch.float32, "cpu", cached)
    try:
        found = hidden_level.errors(provider.loss, x, hidden_level.exact(x, block=16))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert found["loss_error"] < 1e-4 and found["gradient_error"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "torch.compile, authors", "torch.compile, one product", "cut-cross-entropy, torch_compile",
])
def test_what_is_compiled_computes_the_same_loss(name):
    harness.forget_compiled()
    provider = hidden_level.providers("cpu")[name]
    x = hidden_level.make_inputs(harness.HEADS["tiny"], 40, torch.float32, "cpu", False)
    try:
        found = hidden_level.errors(provider.loss, x, hidden_level.exact(x, block=16))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert found["loss_error"] < 1e-4 and found["gradient_error"] < 1e-4


def on_hopper(x: hidden_level.Inputs) -> hidden_level.Inputs:
    """As far as the checks of paths look."""
    weight = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    return x._replace(weight=weight)


@pytest.mark.parametrize("name", [
    "ours", "Liger scaled cross-entropy", "TRL chunked log-prob", "torch linear_cross_entropy",
])
def test_a_row_that_something_slower_serves_is_a_failed_row(name, monkeypatch):
    x = hidden_level.make_inputs(harness.HEADS["tiny"], 40, torch.float32, "cpu", False)
    check = hidden_level.providers("cpu")[name].check
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    if name == "ours":
        monkeypatch.setattr(dispatch.load("triton"), "unavailable_reason", lambda _: "too old")
        x, said = on_hopper(x), "serves linear_soft_value: not triton: too old"
    elif name.startswith("Liger"):
        module = pytest.importorskip(hidden_level.LIGER_SCALED)
        chosen = module._FusedLinearPPOFallbackFunction
        monkeypatch.setattr(module, "_resolve_implementation", lambda device: chosen)
        x, said = on_hopper(x), "_FusedLinearPPOFallbackFunction serves"
    elif name.startswith("TRL"):
        module = pytest.importorskip("trl.kernels.chunked_logprob")
        monkeypatch.setattr(module, "_use_triton", lambda device: False)
        x, said = on_hopper(x), "PyTorch folds its tiles"
    else:
        if not hasattr(torch.nn.functional, "linear_cross_entropy"):
            pytest.skip("this PyTorch has none")
        check(x)  # chunks serve these
        x = x._replace(actions=x.actions.int())
        said = "the chunks don't serve: "
    with pytest.raises(harness.FellBack, match=re.escape(said)) as caught:
        check(x)
    line = report.refusal(name, harness.reason(caught.value))
    assert line.startswith(f"  FAILED: {name}: ") and said in line


def test_a_peer_that_is_not_there_is_not_a_failed_row(monkeypatch):
    x = on_hopper(hidden_level.make_inputs(harness.HEADS["tiny"], 8, torch.float32, "cpu", False))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", None)
    monkeypatch.setitem(sys.modules, hidden_level.LIGER_SCALED, None)
    for name in ("quack chunked", "Liger scaled cross-entropy"):
        with pytest.raises(Unavailable, match="not installed") as caught:
            hidden_level.providers("cpu")[name].check(x)
        assert report.refusal(name, harness.reason(caught.value)).startswith("  not run: ")


def test_what_would_run_eagerly_after_too_many_shapes_fails():
    import torch._dynamo

    # Not by monkeypatch, which deletes what it puts back: these settings are then gone for good.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False, recompile_limit=1):
        harness.forget_compiled()
        twice = torch.compile(lambda x: 2 * x, dynamic=False, backend="eager")
        twice(torch.ones(2))
        with pytest.raises(Exception, match="recompile"):
            twice(torch.ones(3))
    torch._dynamo.reset()


def test_no_new_shape_begins_when_the_time_is_up(tmp_path, capsys):
    arguments = ["--dry-run", "--device", "cpu", "--output", str(tmp_path), "--seconds", "0"]
    for main in (linear_loss.main, logits_loss.main, decoding.main):
        main(arguments)
    assert capsys.readouterr().out.count("left out, 0 s have passed: ") == 2 + 2 + 2
    assert not list(tmp_path.iterdir())


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


def test_evaluation(tmp_path):
    rows = run(evaluation.main, tmp_path, "--no-memory", "--rows", "34")
    assert {r["mode"] for r in rows} == set(evaluation.MODES) and {r["dtype"] for r in rows} == {
        "float32"}
    for row in rows:
        assert row["status"] == "ok"
        assert row["provider"] == evaluation.PRODUCTS or row["largest_error"] < 1e-4
    with pytest.raises(SystemExit, match="products are float32"):
        evaluation.main(["--dry-run", "--dtype", "bfloat16"])


@pytest.mark.parametrize("mode", evaluation.MODES)
def test_everybody_gives_a_state_the_same_scores(mode, monkeypatch):
    """Several chunks of eager's, the last one uneven."""
    monkeypatch.setattr(evaluation, "WORKSPACE_MB", 1)
    x, mode = evaluation.make_inputs("tiny", 150, "cpu"), evaluation.MODES[mode]
    exact = evaluation.exact(x, mode)
    for provider in evaluation.PROVIDERS.values():
        for found, wanted in zip(provider(x, mode), exact, strict=True):
            torch.testing.assert_close(found.to(wanted.dtype), wanted, atol=3e-5, rtol=1e-5)


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
    problems = {problem for *_, problem in served_by.observe("cpu", torch.float32)[:-1]}
    assert problems == {"said to be served by cpu, seen served by torch"}


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


def test_a_case_that_fails_in_a_later_round_leaves_the_others(monkeypatch):
    calls = []

    def tires():
        def run(_):
            calls.append(1)
            if len(calls) > 2:  # the warm-up and one round
                raise torch.OutOfMemoryError("too much at once")

        return Case(run)

    found = harness.interleave(
        {"a": lambda: Case(lambda _: None), "tires": tires, "b": lambda: Case(lambda _: None)},
        "cpu", budget=0.0, min_rounds=4,
    )
    assert list(found) == ["a", "tires", "b"] and found["tires"] == "out of memory"
    assert found["a"].rounds == found["b"].rounds == 4 and len(calls) == 3


@pytest.mark.slow
def test_training_step(tmp_path, capsys):
    rows = run(training_step.main, tmp_path, "--no-memory", "--rounds", "1")
    blocks = ("ours, top L/4 blocks", "ours, top L/8 blocks")
    assert [r["provider"] for r in rows] == 2 * list(step_cases.WAYS)
    for row in rows:
        if row["provider"] in blocks:
            assert row["status"] == "the base has 2 blocks"
            continue
        if row["status"].startswith("not installed"):
            assert row["provider"] == "TRL DPOTrainer"
            continue
        assert row["status"] == "ok"
        assert row["tokens_per_s"] == pytest.approx(
            row["shape"]["padded_tokens"] / row["ms"] * 1e3, rel=1e-3
        )
        assert row["speedup_over_authors"] > 0
        assert ("loss_percent" in row) == row["provider"].startswith("ours")
    assert "of it the loss" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_steps_minimise_the_same_loss(checkpointed):
    """In float32: TRL's and every lever of ours have the loss and the gradients of eager PyTorch.
    (The authors' q is the adapted stream itself: another objective at the same cost.)"""
    setting = training_step.make_setting(
        "tiny", "hh_rlhf_harmless", 96, 4, 2, checkpointed, "cpu", torch.float32
    )
    found = {}
    for name in step_cases.FULL[1:]:
        try:
            way = step_cases.WAYS[name](setting)
        except Unavailable:
            continue
        loss = way.loss(1)
        gradients = torch.autograd.grad(loss, way.parameters)
        found[name] = loss.item(), torch.cat([g.flatten() for g in gradients])
    loss, gradient = found.pop("eager, one product")
    assert gradient.norm() > 0 and len(found) >= 4
    for name, (other_loss, other_gradient) in found.items():
        assert other_loss == pytest.approx(loss, rel=1e-4), name
        assert (other_gradient - gradient).norm() < 1e-3 * gradient.norm(), name


def test_the_authors_step_is_their_objective():
    setting = training_step.make_setting("tiny", "dsp", 96, 2, 2, False, "cpu", torch.float32)
    model = setting.adapted()
    batch = PreferenceCollator(0)(list(step_cases.tokenized(setting)))
    objective = ObjectiveConfig(
        alpha_0=step_cases.BETA, alpha_tilde=step_cases.BETA, chi2_coef=0.0, parametrization="q",
        bootstrap="current",
    )
    with torch.no_grad():
        ours = step_cases.authors_loss(model, batch)
        streams = model.hidden_streams(batch["input_ids"], batch["attention_mask"])
        expected = linear_q_adapter_loss(
            *streams, model.head.weight, batch["input_ids"], batch["completion_mask"], objective
        )
    assert ours.item() == pytest.approx(expected.loss.item(), rel=1e-4)


def test_padding_of_a_cached_batch_is_a_padded_batchs():
    packing = step_cases.in_one_block(
        Packing.of([torch.arange(5), torch.arange(3), torch.arange(1)], share=False)
    )
    [block] = packing.blocks
    assert block.shape == (3, 5)
    assert torch.equal(packing.gather([block]), torch.arange(9))


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
    assert code == 0 and lines[0].startswith("== decoding") and len(lines) == 2
    assert lines[-1].endswith("; failed: none")
    assert {path.name for path in tmp_path.iterdir()} == {"summary.txt", "results.tar.gz"}
    assert "tiny, N 1, temperature: " in (tmp_path / "summary.txt").read_text()
    with tarfile.open(tmp_path / "results.tar.gz") as results:
        names = results.getnames()
        assert {"results/decoding.jsonl", "log/decoding.txt", "summary.txt"} <= set(names)
        # By the data type that is faster here.
        assert fnmatch.filter(names, "results/decoding.cpu*.png")


def test_gpu_script_goes_on_after_a_failing_part(tmp_path):
    code, lines = gpu_script(tmp_path, "false", "a decoding scaling")
    failed = "build tests sanitizer real_sizes served_by decoding scaling"
    assert code == 1 and lines[-1].endswith(f"; failed: {failed}")
    assert (tmp_path / "results.tar.gz").exists()


def test_stages_share_the_time_and_one_that_hangs_is_cut(tmp_path):
    """Without a GPU, and with commands that take their time: the shares alone."""
    script = (FOLDER / "gpu.sh").read_text()
    clock, run_all = script.split("# --- what is brought along")[0], """
for name in a b c d; do
  stage "$name" || continue
  run "${name}_part" 99 true
  SECONDS=$((SECONDS + ${spent[$name]}))
done"""
    def shares(parts: str, **spent: int) -> list[int]:
        said = " ".join(f"[{name}]={spent.get(name, 10)}" for name in "abcd")
        text = clock.replace('cd "$(dirname "$0")/.."', "") + f"declare -A spent=({said}){run_all}"
        done = subprocess.run(
            ["bash", "-c", text], cwd=FOLDER.parent, capture_output=True, text=True, check=True,
            env=os.environ | {"PARTS": parts, "OUT": str(tmp_path)},
        )
        return [int(x) for x in re.findall(r"=== stage \w: (\d+) s", done.stdout)]

    assert shares("a") == [150] and shares("training_step") == [200]
    assert shares("a b") == [150, 200]  # there is room for both
    everything = shares("", a=200, b=200, c=200)
    assert 120 <= everything[0] <= 122 and sum(everything) <= 530
    used = shares("", a=122, b=163, c=163)
    assert used[0] + used[1] + used[2] + used[3] <= 530 and min(used) >= 75
    assert shares("", a=20, b=20, c=20)[1:] == [200, 200, 100]  # what is left over goes on


def test_a_summary_names_ours_the_next_and_what_failed(tmp_path):
    def record(provider, status="ok", **numbers):
        return {"provider": provider, "mode": "both", "base": "cached", "status": status,
                "device": "cuda", "dtype": "bfloat16",
                "shape": {"head": "H", "N": 4096, "vocab": 9, "hidden": 3}, **numbers}

    rows = [
        record("ours", ms=8.0),  # measured again below
        record("slow", ms=9.0, times_ours=4.5), record("near", ms=9.5, times_ours=1.25),
        record("ours", ms=2.0, percent_of_products=104.0, peak_extra_mib=512.0),
        record("ours (torch)", ms=1.0, times_ours=0.5), record("products alone", ms=1.9),
        record("copy", ms=1.0), record("ours", ms=3.0) | {"device": "cpu"},
        record("gone", f"{harness.FAILED}something else served"),
        record("absent", "not installed"), record("absent", "not installed"),
    ]
    for name in ("linear_loss", "training_step"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = list(summary.lines(tmp_path, "cuda"))
    assert found[:4] == [
        "linear_loss:",
        "  H, N 4,096, both, base cached: 2 ms, 104% of products, 512 MiB, next near 1.25×",
        "  FAILED: gone: something else served", "  not run: absent: not installed",
    ]
    assert found[4:7] == ["training_step:", "  H, N 4,096, both, base cached:",
                          "    ours: 2 ms, 512 MiB extra"]
    assert list(summary.lines(tmp_path, "cpu"))[1].endswith("base cached: 3 ms")


def test_gpu_wheels_are_the_pinned_versions():
    """What travels to a GPU machine is what was measured here."""
    pins = (FOLDER.parent / "constraints.txt").read_text().splitlines()
    pins += re.findall(r'"([\w-]+==[\w.]+)"', (FOLDER.parent / "pyproject.toml").read_text())
    wheels = (FOLDER / "gpu-wheels.txt").read_text().splitlines()
    assert {line for line in wheels if not line.startswith("#")} <= set(pins)


# --- large data -----------------------------------------------------------------------------------


def test_the_page_on_scale_has_the_memory_that_was_measured():
    """Flat: a tenth more at the most for ten times the pairs, and for ten times the steps."""
    few, many, long = json.loads(large_data.RESULTS.read_text())["runs"]
    page = (FOLDER.parent / "docs/scale.md").read_text()
    found = page.split("<!-- large-data -->")[1].split("<!-- end -->")[0].strip()
    assert found == large_data.table([few, many, long])
    assert many["pairs"] == 10 * few["pairs"] == 200_000 and long["steps"] == 5000
    assert many["peak_anonymous_bytes"] < 1.1 * few["peak_anonymous_bytes"]
    by_step = long["anonymous_bytes_by_step"]
    assert by_step["5000"] < 1.01 * by_step["500"]
