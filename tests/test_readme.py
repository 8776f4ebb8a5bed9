"""The README says what is true: its numbers are the committed results', its code names exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
DEMO = RESULTS / "demo.json"


def _demo_block() -> str:
    return README.split("<!-- demo -->")[1].split("<!-- /demo -->")[0]


def _cell(summary: dict, key: str, digits: int = 3) -> str:
    value, interval = f"{summary[key]:.{digits}f}", summary.get(f"{key}_ci")
    if interval is None:
        return value
    return f"{value} [{', '.join(f'{x:.{digits}f}' for x in interval)}]"


@pytest.mark.parametrize(
    ("label", "keys", "digits"),
    [
        ("accuracy by reward", ("preference_accuracy",), 3),
        ("accuracy by log-probability",
         ("preference_accuracy_base", "preference_accuracy_policy"), 3),
        ("KL(base‖customised), unrelated text", ("kl_per_token",), 4),
        ("perplexity, unrelated text", ("perplexity_base", "perplexity"), 2),
        ("greedy answers that are one short plain", ("manner_share_base", "manner_share"), 2),
    ],
)
def test_the_readmes_table_is_the_committed_run(label, keys, digits):
    summary = json.loads(DEMO.read_text(encoding="utf-8"))
    (line,) = [
        line for line in _demo_block().splitlines() if re.match(rf"│ {re.escape(label)}\s+│", line)
    ]
    cells = [cell.strip() for cell in line.strip("│").split("│")[1:]]
    assert [cell for cell in cells if cell != "—"] == [_cell(summary, k, digits) for k in keys]


@pytest.mark.parametrize("name", ["demo", "demo.avx2"])
def test_the_committed_runs_reached_the_aims(name):
    summary = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert not summary["fast"]
    assert summary["preference_accuracy"] >= 0.90 and summary["preference_accuracy_base"] <= 0.60
    assert summary["kl_per_token"] <= 0.10
    assert summary["seconds"] < 300 and summary["peak_rss_bytes"] < 4 * 2**30
    assert f"{summary['seconds']:.0f} s" in README


def test_the_readmes_output_is_of_the_committed_run():
    summary = json.loads(DEMO.read_text(encoding="utf-8"))
    seconds = re.search(r"wrote runs/demo in (\d+) s", _demo_block())
    assert int(seconds.group(1)) == round(summary["seconds"])


def test_every_import_of_the_readmes_code_works():
    imported = 0
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert getattr(module, alias.name) is not None
                    imported += 1
    assert imported >= 8


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_real_preferences_are_the_committed_ones():
    lines = (RESULTS / "real_preferences.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = []
    for data, title in (("dsp", "DSP academy"), ("hh", "HH-RLHF harmless")):
        (mean,) = [r for r in rows if (r["step"], r["data"]) == ("mean", data)]
        base = max(mean["accuracy_base_sum"], mean["accuracy_base_mean"])
        found.append(f"{title} {mean['accuracy']:.3f}, base {base:.3f}")
    kls = [
        fmean(r["kl_unrelated"] for r in rows if (r["step"], r["data"]) == ("final", data))
        for data in ("dsp", "hh")
    ]
    text = " ".join(README.split())
    assert "; ".join(found) in text
    assert f"{kls[0]:.3f} and {kls[1]:.3f} nats a token" in text
