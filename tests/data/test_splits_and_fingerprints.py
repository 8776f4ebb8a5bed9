"""Held-out prompts never appear in training; caches are named by what they hold."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from tiny import LLAMA3, chatml, llama3

from qadapter.data import as_preferences, fingerprint, split_by_prompt, tokenize_preferences
from qadapter.errors import QAdapterError

# Twenty prompts, three pairs each, not next to each other.
ROWS = [{"prompt": f"p{i % 20}?", "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(60)]


@pytest.fixture(scope="module")
def pairs():
    return as_preferences(ROWS)


@pytest.mark.parametrize(
    ("held_out", "prompts"),
    [(0.1, [18, 2]), (3, [17, 3]), ((0.1, 4), [14, 2, 4]), (0.001, [19, 1])],
)
def test_parts_share_no_prompt_and_lose_no_pair(pairs, held_out, prompts):
    parts = split_by_prompt(pairs, held_out, seed=1)
    ids = [set(part["prompt_id"]) for part in parts]
    assert [len(part) for part in ids] == prompts
    assert len(set.union(*ids)) == 20  # with the line above: disjoint
    assert [len(part) for part in parts] == [3 * n for n in prompts]
    for part in parts:
        assert list(part["row"]) == sorted(part["row"])


def test_split_depends_on_the_seed_and_not_on_the_order(pairs):
    def held(dataset, seed):
        return set(split_by_prompt(dataset, 5, seed=seed)[1]["prompt_id"])

    assert held(pairs, 0) == held(pairs.shuffle(seed=3), 0)
    assert held(pairs, 0) != held(pairs, 1)


def test_tokenized_pairs_split_alike(pairs):
    tokenized = tokenize_preferences(pairs, llama3()).dataset
    before, after = (split_by_prompt(d, 0.2)[1]["row"] for d in (pairs, tokenized))
    assert list(before) == list(after)


@pytest.mark.parametrize("held_out", [0, 1.0, -1, 20, 21, (10, 10), True, 0.99, float("nan")])
def test_impossible_sizes(pairs, held_out):
    with pytest.raises(QAdapterError):
        split_by_prompt(pairs, held_out)


def tokenized(rows=ROWS, tokenizer=None):
    return tokenize_preferences(rows, tokenizer or llama3()).dataset


def test_fingerprint_changes_with_anything_that_matters():
    tokenizer, data = llama3(), tokenized()
    same = fingerprint(data, tokenizer, "base", 128)
    assert same == fingerprint(tokenized(), llama3(), "base", 128)
    others = {
        fingerprint(data, tokenizer, "other", 128),
        fingerprint(data, tokenizer, {"name": "base"}, 128),
        fingerprint(data, tokenizer, "base", 129),
        fingerprint(data, tokenizer, "base", None),
        fingerprint(data, chatml(), "base", 128),
        fingerprint(data, llama3(LLAMA3 + " "), "base", 128),
        fingerprint(data.select(range(59)), tokenizer, "base", 128),
        fingerprint(data.select([1, 0, *range(2, 60)]), tokenizer, "base", 128),
        fingerprint(tokenized([{**ROWS[0], "chosen": " x"}, *ROWS[1:]]), tokenizer, "base", 128),
    }
    assert len(others) == 9 and same not in others
    assert len(same) == 32


def test_fingerprint_sees_where_the_answer_begins_and_what_is_masked():
    tokenizer = llama3()

    def of(**row):
        data = tokenize_preferences([row], tokenizer).dataset
        return fingerprint(data, tokenizer, "b", 9)

    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5, 6]}
    masked = {**row, "chosen_mask": [True, False], "rejected_mask": [True, True]}
    moved = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6]}
    assert len({of(**row), of(**masked), of(**moved)}) == 3


def test_fingerprint_is_blind_to_arrow_chunks(monkeypatch):
    data = tokenized()
    whole = fingerprint(data, llama3(), "base", 128)
    monkeypatch.setattr("qadapter.data.fingerprints._BATCH", 7)
    assert fingerprint(data, llama3(), "base", 128) == whole


def test_fingerprint_is_the_same_in_every_process():
    """A constant: nothing of this process (hash seed, paths, versions) may enter."""
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    tokenizer = SimpleNamespace(get_vocab=lambda: {"b": 1, "a": 0}, chat_template=None)
    base = {"name": "base", "revision": "1"}
    assert (
        fingerprint(Dataset.from_list([row, row]), tokenizer, base, 8)
        == "c6cfd09dc28a0f1edcc8473e8600be58"
    )
