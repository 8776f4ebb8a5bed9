"""HH-RLHF and DSP, where they are at hand: every row is used or accounted for."""

from pathlib import Path

import pytest
from tiny import chatml

from qadapter.data import load_preferences, split_by_prompt, tokenize_preferences

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="no real preference data in ../shared/data"
)


@pytest.mark.parametrize(
    ("name", "kwargs", "pairs", "dropped"),
    [
        ("hh_rlhf_harmless.jsonl", {}, 150, {"empty_answer": 1}),
        ("hh_rlhf_helpful_transcripts.jsonl", {}, 150, {"empty_answer": 1}),
        (
            "dsp_responses.json",
            {"domain": "academy"},
            600,
            {"identical_answers": 11, "empty_answer": 1},
        ),
        (
            "dsp_responses.json",
            {"domain": "academy", "rejected_domains": ["normal"]},
            150,
            {"identical_answers": 2, "empty_answer": 1},
        ),
    ],
)
def test_rows_are_used_or_accounted_for(name, kwargs, pairs, dropped):
    tokenizer = chatml()
    canonical = load_preferences(DATA / name, limit=150, **kwargs)
    assert len(canonical) == pairs
    result = tokenize_preferences(canonical, tokenizer, max_length=None)
    assert result.report.dropped == dropped
    assert result.report.kept == len(result.dataset) == pairs - sum(dropped.values())
    assert not result.report.notes
    end = tokenizer.eos_token_id
    for row in result.dataset:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end
        assert row["chosen_ids"] != row["rejected_ids"]
    train, held_out = split_by_prompt(result.dataset, 0.2)
    assert not set(train["prompt_id"]) & set(held_out["prompt_id"])
    assert len(train) + len(held_out) == result.report.kept


@pytest.mark.parametrize("name", ["hh_rlhf_harmless.jsonl", "hh_rlhf_helpful_transcripts.jsonl"])
def test_prompt_and_answers_are_the_conversation(name):
    """Decoded, nothing of the two conversations is lost, moved or added."""
    tokenizer = chatml()
    canonical = load_preferences(DATA / name, limit=40)
    dataset = tokenize_preferences(canonical, tokenizer, max_length=None).dataset
    assert len(dataset) == 40
    for source, row in zip(canonical, dataset, strict=True):
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(source["prompt"] + source[side], tokenize=False)
            assert tokenizer.decode(row["prompt_ids"] + row[f"{side}_ids"]) == text.rstrip("\n")
