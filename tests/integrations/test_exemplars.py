"""The exemplar probe, against each example scored alone."""

import collections

import numpy as np
import pytest
import torch
from data.tiny import chatml
from tiny_models import tiny_adapter, tiny_llama

pytest.importorskip("lm_eval")

from qadapter.evaluation import evaluate_retention
from qadapter.integrations.exemplars import (
    ANSWER,
    CHOICE,
    Exemplar,
    evaluate_exemplars,
    load_exemplars,
    worked_solutions,
)

LETTERS = "AAAAAAAABBBBBCCD"  # unlike numbers: models that say other letters score otherwise
OWN = [
    Exemplar("MMLU", f"subject {i // 4}", f"Is it {i}?\n(A) yes (B) no (C) maybe (D) never",
             f"Let us see. {i} is a number. The answer is", f"({LETTERS[i]})")
    for i in range(16)
] + [Exemplar("GSM8K", f"g {i}", f"What is {i} + 1?", "We add. The answer is", f"{i + 1}")
     for i in range(6)]


def test_the_harness_ships_371_exemplars_each_with_its_answer():
    found = load_exemplars()
    assert collections.Counter(e.source for e in found) == {"MMLU": 282, "BBH": 81, "GSM8K": 8}
    assert len({e.group for e in found}) == 57 + 27 + 8
    for exemplar in found:
        assert exemplar.question and exemplar.reasoning.endswith("answer is") and exemplar.answer
        if exemplar.source == "MMLU":
            # One question offers five.
            assert exemplar.choices[:4] == ["A", "B", "C", "D"] and len(exemplar.choices) < 6
        if exemplar.choices:
            assert exemplar.answer[1] in exemplar.choices
        if exemplar.source == "GSM8K":
            assert float(exemplar.answer.replace("$", "")) >= 0 and exemplar.choices == []


@torch.no_grad()
def alone(model, tokenizer, exemplar, measure, strength):
    """Whether one text says what it should, through the model's own forward."""
    before = "The answer is" if measure == CHOICE else exemplar.reasoning
    prompt = f"Q: {exemplar.question}\nA: {before}"
    if exemplar.choices:
        ids = tokenizer(f"{prompt} (")["input_ids"]
        logits = model(torch.tensor([ids]), strength=strength).logits[0, -1]
        letters = [tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in "ABCD"]
        return "ABCD"[int(logits[letters].argmax())] == exemplar.answer[1]
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(f"{prompt} {exemplar.answer}")["input_ids"]
    logits = model(torch.tensor([ids]), strength=strength).logits[0]
    return all(int(logits[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))


@pytest.mark.parametrize("form", ["linear", "block", "mlp"])
def test_right_answers_are_those_of_each_exemplar_alone(form):
    model, tokenizer = tiny_adapter(trained=True, form=form), chatml()
    # Far from its base, so that the two differ in what they choose.
    torch.nn.init.normal_(model.adapter.up.weight, std=2.0)
    found = evaluate_exemplars(model, tokenizer, OWN, batch_size=5, num_resamples=20)
    assert [(f.task, f.metric) for f in found] == [
        ("exemplar probe, MMLU's", f"{CHOICE} (guessing: 0.25)"),
        ("exemplar probe, MMLU's", f"{ANSWER} (guessing: 0.25)"),
        ("exemplar probe, GSM8K's", f"{ANSWER} (guessing: 0.00)"),
    ]
    for score, (source, measure) in zip(
        found, [("MMLU", CHOICE), ("MMLU", ANSWER), ("GSM8K", ANSWER)], strict=True
    ):
        mine = [e for e in OWN if e.source == source]
        base, policy = (
            np.mean([alone(model, tokenizer, e, measure, w) for e in mine]) for w in (0.0, 1.0)
        )
        assert score.num_samples == len(mine)
        assert score.base.value == pytest.approx(base)
        assert score.customised.value == pytest.approx(policy)
        assert score.change.value == pytest.approx(policy - base)
    assert any(score.change.value for score in found)


def test_an_untrained_adapter_answers_as_its_base():
    for score in evaluate_exemplars(tiny_adapter(trained=False), chatml(), OWN, num_resamples=20):
        assert score.base == score.customised and score.change == (0.0, 0.0, 0.0)


def test_every_exemplar_of_the_harness_can_be_asked():
    """One has more choices than its kind, some have none."""
    found = evaluate_exemplars(tiny_llama(), chatml(), num_resamples=5, max_length=48)
    counts = {(f.task.split()[2], f.metric.split(" (")[0]): f.num_samples for f in found}
    assert counts == {
        ("MMLU's", CHOICE): 282, ("MMLU's", ANSWER): 282, ("BBH's", CHOICE): 51,
        ("BBH's", ANSWER): 81, ("GSM8K's", ANSWER): 8,
    }


def test_worked_solutions_are_scored_from_where_they_begin():
    tokenizer = chatml()
    ids, starts = worked_solutions(tokenizer, OWN)
    assert tokenizer.decode(ids[0][starts[0] :]).endswith("The answer is (A).")
    assert tokenizer.decode(ids[0][: starts[0]]).rstrip().endswith("A:")
    found = evaluate_retention(tiny_llama(), ids, prompt_lengths=starts, num_resamples=5)
    assert found.num_texts == len(OWN)
