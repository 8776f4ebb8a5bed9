"""The memo of a frozen trunk: the same hidden states, read once."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_adapter, tokenized

from qadapter.evaluation import evaluate_preferences
from qadapter.trunk.memo import TrunkMemo

TEXTS = [[5, 6, 7, 8], [9, 3], [4, 4, 4]]


class CountingTrunk:
    """The model's trunk, with the rows it was given."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __call__(self, input_ids, attention_mask):
        self.rows += [ids[m.bool()].tolist() for ids, m in zip(input_ids, attention_mask,
                                                               strict=True)]
        return self.model.base_hidden(input_ids, attention_mask)


def padded(texts, side, width=6):
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), None)
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return ids, mask


@pytest.fixture
def trunk():
    return CountingTrunk(tiny_adapter(trained=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_gives_what_the_trunk_gives_and_reads_each_text_once(trunk, side):
    """Rotary positions are relative: on the left padding shifts a row and changes rounding alone.
    Hidden states are of size 1 after the norm, and a row's sums have few dozen float32 terms."""
    ids, mask = padded(TEXTS, side)
    memo = TrunkMemo()
    for _ in range(2):
        found = memo(trunk, ids, mask)
        wanted = trunk.model.base_hidden(ids, mask)
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=1e-5)
        assert not found[~mask.bool()].any()
    assert trunk.rows == TEXTS
    other_side = padded([TEXTS[2], TEXTS[2], [9, 9]], "left" if side == "right" else "right")
    memo(trunk, *other_side)
    assert trunk.rows[3:] == [[9, 9]]


def test_it_keeps_to_its_bound_and_drops_what_was_not_asked_for_longest(trunk):
    memo = TrunkMemo()
    one_token = memo(trunk, *padded([[1]], "right", 1)).nbytes
    memo = TrunkMemo()
    memo.max_bytes = 7 * one_token
    for texts in ([TEXTS[0]], [TEXTS[1]], [TEXTS[0]], [TEXTS[2]]):  # 4 + 2 + 3 tokens > 7
        memo(trunk, *padded(texts, "right"))
    assert memo.num_bytes == 7 * one_token
    before = len(trunk.rows)
    memo(trunk, *padded([TEXTS[0], TEXTS[2]], "right"))
    assert len(trunk.rows) == before
    memo(trunk, *padded([TEXTS[1]], "right"))
    assert trunk.rows[before:] == [TEXTS[1]]
    everything = padded([[3] * 6, [4] * 6], "right")  # one batch beyond the bound
    assert memo(trunk, *everything).shape[:2] == (2, 6)


def test_models_of_one_base_share_it_and_are_scored_as_without_it():
    """To the bit where batches are the same; an adapter's own states are computed anew."""
    plain, sharing = tiny_adapter(trained=True), tiny_adapter(trained=True)
    other = tiny_adapter(trained=False)
    sharing.trunk_memo = other.trunk_memo = TrunkMemo()
    dataset = tokenized()
    wanted = evaluate_preferences(plain, dataset).as_dict()
    for _ in range(2):
        found = evaluate_preferences(sharing, dataset).as_dict()
        assert found["preference_accuracy"] == wanted["preference_accuracy"]
        assert found["reward_margin"] == pytest.approx(wanted["reward_margin"], rel=1e-4)
    assert evaluate_preferences(other, dataset).as_dict()["reward_margin"] == 0.0


def test_models_that_read_before_the_final_norm_share_it_with_others():
    """Each finds its own states there."""
    behind, before = (tiny_adapter(trained=True, form=form) for form in ("linear", "block"))
    ids = torch.tensor([TEXTS[0]])
    wanted = [model.hidden_streams(ids) for model in (behind, before)]
    behind.trunk_memo = before.trunk_memo = memo = TrunkMemo()
    for _ in range(2):
        for model, streams in zip((behind, before), wanted, strict=True):
            for ours, theirs in zip(model.hidden_streams(ids), streams, strict=True):
                assert torch.equal(ours, theirs)
    assert memo.num_bytes == behind.features(ids).nbytes + before.features(ids).nbytes
