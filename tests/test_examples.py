"""The examples run as their first lines say, and their loss falls."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import preference_rows, save_tiny, write_jsonl

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(example, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *map(str, arguments)],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def inputs(tmp_path):
    return save_tiny(tmp_path / "model"), write_jsonl(tmp_path / "pairs.jsonl", preference_rows(8))


@pytest.mark.slow
def test_own_training_loop(inputs, tmp_path):
    printed = run("own_training_loop.py", *inputs, "--steps", 12, "--output_dir", tmp_path / "out")
    losses = [float(x) for x in re.findall(r"loss (\S+)", printed)]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(0.6931, abs=2e-3)  # at the base, within bfloat16's rounding
    assert losses[-1] < 0.66
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_in_trl(inputs, tmp_path):
    pytest.importorskip("trl")
    printed = run("in_trl.py", *inputs, "--max_steps", 12, "--output_dir", tmp_path / "out")
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(0.6931, abs=2e-3)
    assert losses[-1] < 0.66
    assert "rewards/margins" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
