"""Two processes give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_parallel_run import run
from ranks import environments
from safetensors.torch import load_file
from torch.testing import assert_close

from qadapter.errors import QAdapterError
from qadapter.training.checkpoints import check_whole, checkpoints_in

SCRIPT = Path(__file__).with_name("data_parallel_run.py")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["head", "lora"])
def test_two_processes_train_and_evaluate_like_one(tmp_path, adapter):
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), "2", "disk", adapter],
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for environment in environments(2)
    ]
    alone = tmp_path / "alone"
    alone.mkdir()
    try:
        run(alone, 4, "memory", adapter)
        for process in processes:
            output, _ = process.communicate()
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (tmp_path, alone))
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["resumed_alike"] and theirs["resumed_alike"]
    for folder in (tmp_path, alone):
        assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-4", "checkpoint-6"]
        check_whole(folder / "checkpoint-6")
    with pytest.raises(QAdapterError, match="rng_state_1"):
        (tmp_path / "checkpoint-6/rng_state_1.pth").unlink()
        check_whole(tmp_path / "checkpoint-6")
    assert ours["streamed"] == pytest.approx(theirs["streamed"], rel=1e-4)
    # Of training pairs and held-out ones each shard once, and all have computed some.
    computed = sorted(rows for found in ours["computed"] for rows in found)
    assert computed == sorted(
        list(range(start, min(start + 3, count))) for count in (16, 7)
        for start in range(0, count, 3)
    )
    assert len(ours["computed"]) == 2 and all(ours["computed"])
    for one, other in zip(ours["logs"], theirs["logs"], strict=True):
        for name in one.keys() - {"grad_norm"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for name in ("loss", "rewards/margins", "chi2_loss", "logps/rejected"):
        expected = theirs["metrics"][f"eval_{name}"]
        assert ours["metrics"][f"eval_{name}"] == pytest.approx(expected, rel=1e-4), name
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, alone)]
    assert_close(*weights, rtol=1e-4, atol=1e-6)
