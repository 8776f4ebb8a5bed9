"""lm-evaluation-harness on our policies: an own task of each kind, from files in this folder."""

import json
from pathlib import Path

import pytest
import torch
from data.tiny import chatml
from tiny_models import save_tiny, tiny_adapter, tiny_llama

from qadapter import QAdapterError
from qadapter.cli import main

pytest.importorskip("lm_eval")

from qadapter.integrations.lm_eval import _values, compare_tasks, evaluate_tasks

TASKS = Path(__file__).parent / "lm_eval_tasks"
CHOICE, GENERATE = "qadapter_colors_choice", "qadapter_colors_generate"


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    # The task files name their data from the repository's root.
    monkeypatch.chdir(Path(__file__).parents[2])


def examples():
    return [json.loads(line) for line in (TASKS / "colors.jsonl").read_text().splitlines()]


@torch.no_grad()
def continuation(logits, tokenizer, question, answer):
    """log π̃(answer | question) from a model's own forward, one text at a time."""
    prompt = tokenizer(question)["input_ids"]
    ids = tokenizer(question + answer)["input_ids"]
    logps = logits(torch.tensor([ids]))[0].float().log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))


@torch.no_grad()
def greedy(logits, tokenizer, question, steps):
    ids = tokenizer(question)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        ids = [*ids, int(logits(torch.tensor([ids]))[0, -1].argmax())]
    return tokenizer.decode(ids[start:])


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_a_likelihood_task_scores_the_policy(strength):
    model, tokenizer = tiny_adapter(trained=True), chatml()
    [score] = evaluate_tasks(model, tokenizer, [CHOICE], include_path=TASKS, strength=strength)
    expected = []
    for row in examples():
        worth = [
            continuation(lambda x: model(x, strength=strength).logits, tokenizer, row["question"],
                         f" {choice}")
            for choice in row["choices"]
        ]
        expected.append(float((worth[1] > worth[0]) == row["answer"]))
    assert list(score.values.values()) == expected
    assert score.estimate.value == pytest.approx(sum(expected) / 24)
    assert score.num_samples == 24 and model.policy.strength == 1.0


def test_the_policies_compared_differ():
    """Else the tests around this one could not fail."""
    model, tokenizer = tiny_adapter(trained=True), chatml()
    [choice] = compare_tasks(model, tokenizer, [CHOICE], include_path=TASKS)
    assert choice.change.low < choice.change.high
    difference = choice.customised.value - choice.base.value
    assert choice.change.value == pytest.approx(difference)


def test_a_generative_task_runs_the_policy(tmp_path):
    """Its right answers are what the policy writes, and not what the base writes."""
    model, tokenizer = tiny_adapter(trained=True), chatml()
    rows = []
    for row in examples():
        said = greedy(lambda x: model(x).logits, tokenizer, row["question"], 6)
        # The harness cuts at the task's "." and so do its targets.
        rows.append(row | {"choices": [said.split(".")[0]], "answer": 0})
    (tmp_path / "colors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = (TASKS / "colors_generate.yaml").read_text()
    task = task.replace("tests/integrations/lm_eval_tasks", str(tmp_path))
    (tmp_path / "task.yaml").write_text(task.replace(GENERATE, "qadapter_said"))
    [score] = compare_tasks(model, tokenizer, ["qadapter_said"], include_path=tmp_path)
    assert score.metric == "exact_match" and score.num_samples == 24
    assert score.customised.value == 1.0
    assert score.base.value < 1.0


def test_an_untrained_adapter_scores_as_its_base_and_a_plain_model_has_one_column():
    tokenizer = chatml()
    untrained = compare_tasks(
        tiny_adapter(trained=False), tokenizer, [CHOICE, GENERATE], include_path=TASKS
    )
    for score in untrained:
        assert score.base == score.customised
        assert score.change == (0.0, 0.0, 0.0)
    plain = compare_tasks(tiny_llama(), tokenizer, [CHOICE], include_path=TASKS)
    assert plain[0].base == untrained[0].base
    assert plain[0].customised is None and plain[0].change is None


def test_a_metric_that_is_no_mean_over_the_examples_has_no_change():
    """A perplexity is an exponential of a mean: its examples hold log-likelihoods."""
    samples = [{"doc_hash": name, "acc": value} for name, value in (("a", 1.0), ("b", 0.0))]
    assert _values(samples, "acc", 0.5) == {("a", 0): 1.0, ("b", 0): 0.0}
    assert _values(samples, "acc", 0.7) == {}


def test_errors_name_the_task_the_folder_and_the_limit(tmp_path):
    model, tokenizer = tiny_llama(), chatml()
    with pytest.raises(QAdapterError, match="no task called 'qadapter_nothing'"):
        evaluate_tasks(model, tokenizer, ["qadapter_nothing"], include_path=TASKS)
    with pytest.raises(QAdapterError, match="no_folder is no folder"):
        evaluate_tasks(model, tokenizer, [CHOICE], include_path=tmp_path / "no_folder")
    for limit in (0, -1, 2.5):
        with pytest.raises(QAdapterError, match="lm_eval_limit"):
            evaluate_tasks(model, tokenizer, [CHOICE], include_path=TASKS, limit=limit)
    (tmp_path / "lost.yaml").write_text(
        (TASKS / "colors_choice.yaml").read_text().replace("colors.jsonl", "lost.jsonl")
        .replace(CHOICE, "qadapter_lost")
    )
    with pytest.raises(QAdapterError, match="data of qadapter_lost can't be loaded"):
        evaluate_tasks(model, tokenizer, ["qadapter_lost"], include_path=tmp_path)


def test_eval_needs_no_pairs_for_tasks_and_writes_them(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    with pytest.raises(SystemExit) as end:
        main(["eval", str(tmp_path / "model"), "--lm_eval", f"{CHOICE}, {GENERATE}",
              "--lm_eval_include_path", str(TASKS), "--lm_eval_limit", "4",
              "--output_dir", str(tmp_path / "out")])
    assert end.value.code == 0
    assert f"{CHOICE}: acc" in capsys.readouterr().out
    written = json.loads((tmp_path / "out/eval.json").read_text())
    assert [score["task"] for score in written["lm_eval"]] == [CHOICE, GENERATE]
    assert all(score["num_samples"] == 4 for score in written["lm_eval"])
    assert f"| {CHOICE}: acc |" in (tmp_path / "out/report.md").read_text()
    assert not (tmp_path / "out/pairs.jsonl").exists()


def test_options_of_lm_eval_need_it(tmp_path, capsys):
    for flags, message in (
        (["--lm_eval_limit", "4"], "lm_eval_limit needs --lm_eval"),
        ([], "eval needs --dataset_name, --lm_eval or --exemplar_probe"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["eval", str(tmp_path), *flags])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
