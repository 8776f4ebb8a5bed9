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
    for name, task in module.TASKS.items():
        small = dataclasses.replace(task, test=3, kl_limit=10.0)
        monkeypatch.setitem(module.TASKS, name, small)
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


@pytest.mark.slow
def test_the_three_steps_write_their_table_and_the_test_split_is_scored_once(
    bench, folders, tmp_path, capsys
):
    folders += ["--tasks", "dsp"]
    for step in (["search", "--most", "1"], ["search", "--most", "2"], ["final"], ["probe"]):
        assert bench.main([*step, *folders]) == 0
    searched, final = lines(tmp_path, "search"), lines(tmp_path, "final")
    # A search resumes: what was done is not done again.
    assert [row["fold"] for row in searched] == [0, 1, 2, 0, 1, 2]
    assert [row["seed"] for row in final] == [*bench.FINAL_SEEDS]
    choice = dataclasses.asdict(bench.chosen(searched, 10.0))
    assert all(row["choice"] == choice for row in final)
    (mean,) = lines(tmp_path, "mean")
    assert (mean["prompts"], mean["pairs"]) == (3, 12)
    assert mean["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in final]))
    assert mean["length_baseline"] == "shorter"  # "academy" is a short word
    (probe,) = lines(tmp_path, "probe")
    assert probe["accuracy"] > 0.9  # the name of the domain is in every answer
    table = (tmp_path / "real_preferences.md").read_text()
    assert f"{final[0]['accuracy']:.3f}" in table and final[0]["environment"]["machine"] in table

    assert bench.main(["final", *folders]) == 2
    assert "scored once" in capsys.readouterr().err
    assert len(lines(tmp_path, "final")) == len(final)


def test_folds_share_no_prompt_and_hold_every_pair_out_once(bench, folders):
    task = bench.Bench("dsp", bench.parse(["search", *folders]))
    prompts = task.data["development"]["prompt_id"][:]
    held_out = []
    for number in range(bench.FOLDS):
        train, scored = task.fold(number)
        assert not {prompts[i] for i in train} & {prompts[i] for i in scored}
        assert max(np.unique([prompts[i] for i in train], return_counts=True)[1]) == 2
        held_out += scored
    assert sorted(held_out) == list(range(len(prompts)))
    assert not set(prompts) & set(task.data["test"]["prompt_id"][:])


def test_the_choice_is_the_best_over_all_folds_within_the_bound(bench):
    def rows(alpha, kl, right, folds=bench.FOLDS):
        choice = dataclasses.asdict(bench.Choice(alpha, 1e-3, 1, 0))
        return [
            {"choice": choice, "fold": i, "kl_helpful": kl, "accuracy": r / 10, "right": r}
            for i, r in enumerate(right[:folds])
        ]

    searched = rows(0.1, 0.5, [9, 9, 9]) + rows(0.3, 0.02, [8, 5, 5]) + rows(1.0, 0.01, [7, 7, 7])
    assert bench.chosen(searched, 0.03).alpha == 1.0
    with pytest.raises(bench.QAdapterError, match="to its end"):
        bench.chosen(rows(0.3, 0.02, [8], folds=1), 0.03)


def test_without_the_data_it_says_so_and_exits_with_2(bench, tmp_path, capsys):
    assert bench.main(["features", "--data", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "hh_rlhf_harmless.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "real_preferences.jsonl").exists()


def test_an_untrained_adapter_scores_one_half_and_moves_nothing(bench, folders, tmp_path):
    options = bench.parse(["features", "--tasks", "hh", *folders])
    task = bench.Bench("hh", options)
    bench.run_features(task, bench.Log(tmp_path, options.base))
    bench.run_features(bench.Bench("hh", options), bench.Log(tmp_path, options.base))
    parts = [row["part"] for row in lines(tmp_path, "features")]
    assert parts == ["development", "test", "helpful"]  # once each: then they are there
    features = task.features("development")
    scores = bench.score_pairs(task.fresh, features)
    bootstrap = bench.ClusterBootstrap(task.data["development"]["prompt_id"][:])
    measured = bench.accuracies(scores, bootstrap) | task.forgetting(task.fresh, features)
    assert measured["accuracy"] == 0.5 and measured["accuracy_length_controlled"] in (0.5, None)
    assert measured["perplexity"] == measured["perplexity_base"]
    assert measured["kl_answers"] == pytest.approx(0, abs=1e-6)
    assert scores.rewards == pytest.approx(0)
    assert (scores.logps < 0).all()
