"""benchmarks/real_preferences.py on a tiny model and made-up preferences."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import WORDS, preference_rows, save_tiny, write_jsonl

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("real_preferences")
    small = {"train": 8, "validation": 3, "test": 3}
    for name, task in module.TASKS.items():
        monkeypatch.setitem(module.TASKS, name, dataclasses.replace(task, **small))
    monkeypatch.setattr(module, "KL_LIMIT", 10.0)
    return module


@pytest.fixture
def folders(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    domains = ("academy", "business", "entertainment", "literature", "normal")
    queries = [
        {"query": f"What is {word} {i}?", "responses": {d: f"{d} {word} {i}" for d in domains}}
        for i in range(2) for word in WORDS
    ]
    (data / "dsp_responses.json").write_text(json.dumps(queries))
    write_jsonl(data / "hh_rlhf_harmless.jsonl", preference_rows(40))
    write_jsonl(data / "hh_rlhf_helpful_transcripts.jsonl", [
        {"chosen": f"\n\nHuman: Why {w}?\n\nAssistant: So.",
         "rejected": f"\n\nHuman: Why {w}?\n\nAssistant: No {w}."} for w in WORDS
    ])
    return ["--data", str(data), "--cache", str(tmp_path / "cache"), "--base",
            str(save_tiny(tmp_path / "model")), "--output", str(tmp_path)]


def lines(tmp_path, step):
    text = (tmp_path / "real_preferences.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["step"] == step]


def test_the_three_steps_write_their_table_and_the_test_split_is_scored_once(
    bench, folders, tmp_path, capsys
):
    folders += ["--tasks", "dsp"]
    for step in (["search", "--most", "1"], ["search", "--most", "2"], ["final"]):
        assert bench.main([*step, *folders]) == 0
    searched, final = lines(tmp_path, "search"), lines(tmp_path, "final")
    assert len(searched) == 2  # a search resumes: what was done is not done again
    assert [row["seed"] for row in final] == [*bench.FINAL_SEEDS]
    assert all(row["choice"] == bench.best(searched)["choice"] for row in final)
    assert {(row["prompts"], row["pairs"]) for row in final} == {(3, 12)}
    (mean,) = lines(tmp_path, "mean")
    assert mean["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in final]))
    assert {row["length_baseline"] for row in final} == {"shorter"}  # "academy" is a short word
    table = (tmp_path / "real_preferences.md").read_text()
    assert f"{final[0]['accuracy']:.3f}" in table and final[0]["environment"]["machine"] in table

    assert bench.main(["final", *folders]) == 2
    assert "scored once" in capsys.readouterr().err
    assert len(lines(tmp_path, "final")) == len(final)


def test_without_the_data_it_says_so_and_exits_with_2(bench, tmp_path, capsys):
    assert bench.main(["features", "--data", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "hh_rlhf_harmless.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "real_preferences.jsonl").exists()


def test_an_untrained_adapter_scores_one_half_and_moves_nothing(bench, folders, tmp_path):
    options = bench.parse(["features", "--tasks", "hh", *folders])
    task = bench.Bench("hh", options)
    bench.run_features(task, bench.Log(tmp_path, options.base))
    bench.run_features(task, bench.Log(tmp_path, options.base))
    parts = [row["part"] for row in lines(tmp_path, "features")]
    assert parts == ["train", "validation", "helpful", "test"]  # once each: then they are there
    scores = bench.score_pairs(task.fresh, task.features("validation"))
    measured = task.measure(task.fresh, "validation", scores)
    assert measured["accuracy"] == 0.5 and measured["accuracy_length_controlled"] in (0.5, None)
    assert measured["perplexity"] == measured["perplexity_base"]
    assert measured["kl_answers"] == pytest.approx(0, abs=1e-6)
    assert scores.rewards == pytest.approx(0)
    assert (scores.logps < 0).all()


def test_the_standard_error_counts_prompts_not_pairs(bench):
    right = np.array([1.0, 0, 1, 1, 0, 1])
    single = bench.clustered_se(right, list("abcdef"))
    assert single == pytest.approx(right.std(ddof=1) / np.sqrt(6))
    # Every pair four times over, with its prompt's name, is no more evidence.
    repeated = bench.clustered_se(right.repeat(4), np.repeat(list("abcdef"), 4))
    assert repeated == pytest.approx(single)
