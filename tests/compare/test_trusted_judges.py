"""A judge that hardly ranks held-out pairs is heard nowhere, and the report says so."""

from __future__ import annotations

import json
import math

import pytest
from comparisons import settings, write_config
from made_up import write_results
from tiny_models import cli

from qadapter.compare import read_config, read_results, write_report
from qadapter.compare.against import against, at_equal_gain
from qadapter.compare.measure import LEAST_ACCURACY, trusted
from qadapter.compare.page import columns
from qadapter.compare.pictures import draw_all, draw_frontier
from qadapter.compare.results import judged

METHODS = {name: settings()["methods"][name] for name in ("dpo", "q")}


def read(folder, judges):
    config = read_config(write_config(folder, methods=METHODS, sweeps={}))
    write_results(config, folder / "out", judges=judges)
    return read_results(config, folder / "out", "validation")


@pytest.mark.parametrize(("accuracy", "used"), [
    (LEAST_ACCURACY, True), (math.nextafter(LEAST_ACCURACY, 0), False), (0.2, False), (None, False),
])
def test_a_judge_is_trusted_by_its_accuracy(accuracy, used):
    assert trusted({"accuracy": accuracy}) is used


def test_the_terminal_says_it_too(tmp_path, capsys):
    read(tmp_path, {"good": 0.9, "poor": 0.55})
    flags = (tmp_path / "compare.yaml", "--output_dir", tmp_path / "out", "--report_only")
    assert cli("compare", *flags) == 0
    assert "Judges below 0.6 are not used: poor (new preference)" in " ".join(
        capsys.readouterr().out.split())


def test_what_is_shown_is_by_the_judges_that_are_trusted(tmp_path):
    found = read(tmp_path, {"good": 0.9, "fair": 0.7, "poor": 0.55})
    dpo, q = found.reference, found.results[2]
    assert dpo.number(judged("new", "gain")).mean == pytest.approx(0.8)
    assert dpo.number(judged("old", "win_rate")).mean == pytest.approx(0.8)
    assert dpo.number(judged("new", "gain", "poor")) is None
    assert against(q, dpo).gain.value == 0 and at_equal_gain(q, dpo).at_most
    page = write_report(found, tmp_path / "out").read_text()
    told = "Judges below 0.6 are not used: poor (new preference), which ranks 0.550"
    assert told in page and "poor: ranks 0.550 [0.450, 0.650]" in page
    summary = json.loads((tmp_path / "out/summary-validation.json").read_text())
    assert summary["judges_left_out"] == [["new", "poor"], ["old", "poor"]]
    assert summary["judges"]["new"]["poor"]["accuracy"] == 0.55


def test_without_a_trusted_judge_no_gain_is_shown(tmp_path):
    """What the answers are is shown all the same; pictures show the accuracy."""
    found = read(tmp_path, {"poor": 0.55, "none": None})
    assert found.sampled and not found.judged
    keys = {column.key for column in columns(found)}
    assert {"words", "kl_new_answers"} <= keys
    assert not any("gain" in key or "win_rate" in key for key in keys)
    dpo, q = found.reference, found.results[2]
    assert math.isnan(against(q, dpo).gain.value) and at_equal_gain(q, dpo) is None
    assert "win_rates" not in [picture.name for picture in draw_all(found)]
    assert "accuracy" in draw_frontier(found).axes[0].get_ylabel()
    page = write_report(found, tmp_path / "out").read_text()
    assert "not used, so that no gain is shown: poor (new preference)" in page
    assert "At the gain of" not in page and "judged gain, new" not in page.split("Against")[0]


def test_where_all_are_trusted_nothing_is_said(tmp_path):
    found = read(tmp_path, {"good": 0.9, "fair": 0.7})
    assert not found.left_out
    assert "not used" not in write_report(found, tmp_path / "out").read_text()
