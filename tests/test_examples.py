"""The examples run as their first lines say, and their loss falls."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import preference_rows, save_tiny, write_jsonl

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    rows = preference_rows(8)
    for row in rows[::3]:  # answers of other lengths: means over processes tell
        row["rejected"][0]["content"] *= 4
    return save_tiny(folder / "model"), write_jsonl(folder / "pairs.jsonl", rows)


@pytest.fixture
def run(inputs, tmp_path, monkeypatch, capsys):
    """Runs an example on a tiny model, in this process; what it printed."""

    def run(example, *arguments, output_dir="out"):
        command = [EXAMPLES / example, *inputs, *arguments, "--output_dir", tmp_path / output_dir]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        assert (tmp_path / output_dir / "adapter_model.safetensors").is_file()
        return capsys.readouterr().out

    return run


def losses_of(printed, pattern=r"loss (\S+)", last=0.66):
    """At the base in the first step, within bfloat16's rounding; lower in the last."""
    losses = [float(x) for x in re.findall(pattern, printed)]
    assert losses[0] == pytest.approx(0.6931, abs=2e-3)
    assert losses[-1] < last
    return losses


def test_own_training_loop(run):
    assert len(losses_of(run("own_training_loop.py", "--steps", 12))) == 12


def test_in_trl(run):
    pytest.importorskip("trl")
    printed = run("in_trl.py", "--max_steps", 12)
    assert len(losses_of(printed, r"'loss': '?([\d.]+)")) == 12
    assert "rewards/margins" in printed


def test_in_lightning(run):
    pytest.importorskip("lightning")
    printed = run("in_lightning.py", "--max_steps", 12)
    metrics = dict(re.findall(r"'([\w/]+)': '([-\d.]+)'", printed))
    assert float(metrics["loss"]) < 0.66
    assert float(metrics["rewards/margins"]) > 0


def test_in_accelerate_on_one_process_and_on_two(run, inputs, tmp_path):
    """Two processes with two pairs each take the step of one with four: the same losses, and the
    same LoRA, though one may have more actions than the other."""
    weighty = ("--max_steps", "8", "--chi2_coef", "20")  # the term that is a mean over actions
    one = losses_of(run("in_accelerate.py", *weighty, "--batch_size", 4), last=0.6931)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         EXAMPLES / "in_accelerate.py", *inputs, *weighty, "--batch_size", "2",
         "--output_dir", tmp_path / "two"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses_of(done.stdout, last=0.6931) == pytest.approx(one, abs=1e-4)
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "two"))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(theirs[name], x, atol=2e-4, rtol=0)


def test_examples_are_short_and_all_are_here():
    """And each says in its first lines how it is run."""
    tested = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert f'"{path.name}"' in tested
        assert f"examples/{path.name}" in text.split('"""')[1]
        assert len(text.splitlines()) <= 90
