import io
import json
import math

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_models import tiny_adapter, tiny_llama, tokenized

from qadapter.evaluation import (
    Estimate,
    comparison_table,
    evaluate_preferences,
    evaluate_retention,
    plot_training_curves,
    write_metrics_jsonl,
    write_report,
)
from qadapter.evaluation.preference import Calibration, ReliabilityBin
from qadapter.evaluation.report import (
    Row,
    Section,
    answer_rows,
    baseline_note,
    comparison_markdown,
    format_value,
    pictures_markdown,
    plot_calibration,
    preference_rows,
    retention_rows,
    write_json,
)

LOG = [
    {"step": 10, "loss": 0.69, "rewards/accuracies": 0.5, "rewards/margins": 0.0},
    {"step": 10, "eval_loss": 0.69, "eval_rewards/accuracies": 0.5, "eval_kl_base_policy": 0.0},
    {"step": 20, "loss": 0.5, "rewards/accuracies": 0.8, "rewards/margins": 1.0},
    {"step": 20, "train_runtime": 1.0},
]


def test_curves_are_drawn_for_what_is_in_the_log(tmp_path):
    paths = plot_training_curves(LOG, tmp_path)
    names = ["loss.png", "preference_accuracy.png", "reward_margins.png", "kl.png"]
    assert [path.name for path in paths] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (960, 600)
            assert len(picture.convert("L").getcolors()) > 10
    assert plot_training_curves([{"step": 1, "epoch": 1.0}], tmp_path / "none") == []


def test_every_table_names_the_baselines_and_the_report_holds_it_all(tmp_path):
    model = tiny_adapter(trained=True)
    preferences = evaluate_preferences(model, tokenized(), num_resamples=20)
    kept = evaluate_retention(model, [[4, 5, 6], [7, 8, 9]], num_resamples=20)
    rows = [*preference_rows(preferences), *retention_rows(kept), *answer_rows({}, None)]
    note = baseline_note(preferences)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(rows, title="t", note=note))
    shown, markdown = console.export_text(), comparison_markdown(rows, note=note)
    for text in (shown, markdown):
        assert "longer answer wins" in " ".join(text.split()) and "coin 0.500" in text
        assert "accuracy by reward, length-controlled" in text
        assert f"{preferences.preference_accuracy.value:.3f} [" in text
        assert f"{kept.perplexity_base.value:.2f} [" in text
    picture = plot_calibration(preferences.calibration, tmp_path / "pictures/calibration.png")
    report = tmp_path / "report.md"
    write_report(report, "A run", [Section("Numbers", markdown),
                                   Section("Pictures", pictures_markdown([picture], report))])
    text = report.read_text()
    assert text.startswith("# A run\n\n## Numbers\n\n| measure | base | customised |")
    assert "![calibration](pictures/calibration.png)" in text
    write_json(tmp_path / "summary.json", preferences.as_dict() | kept.as_dict())
    read = json.loads((tmp_path / "summary.json").read_text())
    assert read["kl_per_token"] == kept.kl_per_token.value
    assert len(read["preference_accuracy_ci"]) == 2


def test_a_plain_model_fills_the_base_column_only():
    rows = preference_rows(evaluate_preferences(tiny_llama(), tokenized(), num_resamples=5))
    assert rows and all(row.customised is None and row.base is not None for row in rows)


def test_values_read_well():
    assert format_value(Estimate(0.9126, 0.8711, 0.95)) == "0.913 [0.871, 0.950]"
    assert format_value(Estimate(0.9126, math.nan, math.nan)) == "0.913"
    assert format_value(Estimate(math.nan, math.nan, math.nan)) == "—"
    assert format_value(None) == "—" and format_value(1234) == "1,234"
    assert format_value(0.5, 1) == "0.5" and format_value("12 of 40") == "12 of 40"
    assert "| a | 1 | — |" in comparison_markdown([Row("a", 1, None)])


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    write_metrics_jsonl(tmp_path / "metrics.jsonl", LOG)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == LOG
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_what_is_no_number_is_left_out_of_pictures_and_null_in_json(tmp_path):
    """After a training that took hours, whatever its log holds."""
    odd = [math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, None, "x"]
    log = [{"step": i, "loss": x, "rewards/margins": x, "eval_kl_base_policy": 1.0}
           for i, x in enumerate(odd)]
    log += [{"loss": 1.0}, {"step": "x", "loss": 1.0}, {"step": 9, "loss": 0.5}]
    assert [p.name for p in plot_training_curves(log, tmp_path)] == ["loss.png", "kl.png"]
    write_metrics_jsonl(tmp_path / "metrics.jsonl", log)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row.get("loss") for row in read[:4]] == [None, None, None, 1e308]
    nothing = Estimate(math.nan, math.nan, math.nan)
    for bins in ((), (ReliabilityBin(0.5, 1.0, 0, None, None),)):
        assert plot_calibration(Calibration(0.0, nothing, nothing, bins), tmp_path / "c.png")


def test_a_model_of_no_numbers_is_neither_right_nor_wrong():
    model = tiny_adapter(trained=True)
    torch.nn.init.constant_(model.adapter.up.weight, math.nan)
    found = evaluate_preferences(model, tokenized(), num_resamples=5)
    assert math.isnan(found.preference_accuracy.value)
    flat = found.as_dict() | evaluate_retention(model, [[4, 5, 6]], num_resamples=5).as_dict()
    json.dumps(flat, allow_nan=False)
    assert flat["preference_accuracy"] is None and flat["preference_accuracy_base"] is not None
    assert "| accuracy by reward | — | — |" in comparison_markdown(preference_rows(found))


def test_a_perplexity_beyond_all_numbers_is_infinite():
    model = tiny_adapter(trained=True)
    torch.nn.init.constant_(model.adapter.up.weight, 1e6)
    found = evaluate_retention(model, [[4, 5, 6], [7, 8, 9]], num_resamples=5)
    assert found.perplexity.value == math.inf and found.as_dict()["perplexity"] is None
