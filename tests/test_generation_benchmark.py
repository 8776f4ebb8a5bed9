"""The decoding benchmark runs, and its two passes are the policy that ours decodes."""

# ruff: noqa: E402  (the scripts' folder has to be on the path first)

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from scripts import load_script
from tiny_models import tiny_base

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.exists():
    pytest.skip("tests of a checkout, and this is an installed copy", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import generation
import report

from qadapter import QAdapterModel


def test_every_provider_runs(tmp_path):
    generation.main(["--dry-run", "--device", "cpu", "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "generation.jsonl").read_text().splitlines()]
    assert list(tmp_path.glob("generation.cpu*.png"))  # by the data type that is faster here
    assert {r["status"] for r in rows} == {"ok"} and len(rows) == 2 * 10
    for row in rows:
        assert row["shape"]["B"] * row["shape"]["new_tokens"] / row["ms"] * 1e3 == pytest.approx(
            row["tokens_per_s"], rel=1e-3
        )
    assert rows[0]["provider"] == "base" and rows[0]["times_base"] == 1


def test_two_passes_are_the_policy_of_ours():
    base = tiny_base()
    model = QAdapterModel.from_base(copy.deepcopy(base), "paper", generation.POLICY).eval()
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompt_BT = torch.tensor([[5, 9, 11], [3, 20, 7]])
    def tokens(case):
        return case.run(case.prepare())

    ours = tokens(generation.generating(model, prompt_BT, 8, generation.STRENGTH))
    adapted = model.adapter.peft_model
    assert torch.equal(tokens(generation.two_passes(adapted, base, prompt_BT, 8)), ours)
    for other in (base, model):
        assert not torch.equal(tokens(generation.generating(other, prompt_BT, 8)), ours)
        expected = other.generate(prompt_BT, max_new_tokens=8, do_sample=False)
        assert torch.equal(tokens(generation.generating(other, prompt_BT, 8)), expected)


def test_the_table_in_the_docs_is_of_the_committed_run():
    tables = load_script(FOLDER.parent / "docs/what_serves_it.py")
    page = tables.SERVING.read_text(encoding="utf-8")
    assert page.split("<!-- costs -->\n")[1].split("<!-- end -->")[0] == tables.costs()


def test_the_committed_run_shows_what_two_streams_are_for():
    records = report.latest(FOLDER / "results/generation.jsonl", "cpu")
    times = {r["provider"]: r["ms"] for r in records if r["shape"]["B"] == 1}
    for passes in ("two passes, PEFT", "two passes, merged"):
        assert times[passes] / times["ours, LoRA at strength 0.5"] >= 1.5
