"""Batches: layout, padding, and masks by position."""

import torch
from tiny import chatml, turns

from qadapter.data import PreferenceCollator, tokenize_preferences

EXAMPLES = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2], "rejected_ids": [9, 9, 9, 2], "row": 4},
    {"prompt_ids": [5], "chosen_ids": [2], "rejected_ids": [8], "row": 7},
]


def test_chosen_then_rejected_padded_on_the_right():
    batch = PreferenceCollator(pad_token_id=0)(EXAMPLES)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 2, 0, 0],
        [5, 2, 0, 0, 0, 0, 0],
        [5, 6, 7, 9, 9, 9, 2],
        [5, 8, 0, 0, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 7, 2]
    assert batch["completion_mask"].int().tolist() == [
        [0, 0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 0, 0, 0, 0, 0],
    ]
    assert batch["rows"].tolist() == [4, 7]
    assert batch["completion_mask"].dtype == torch.bool
    assert {batch[k].dtype for k in ("input_ids", "attention_mask", "rows")} == {torch.int64}


def test_the_end_of_turn_is_learned_where_padding_has_its_id():
    other, same = (PreferenceCollator(pad_token_id=i)(EXAMPLES) for i in (0, 2))
    assert torch.equal(other["completion_mask"], same["completion_mask"])
    assert torch.equal(other["attention_mask"], same["attention_mask"])
    learned = same["input_ids"][same["completion_mask"]]
    assert (learned == 2).sum() == 3


def test_pad_to_multiple_of():
    batch = PreferenceCollator(pad_token_id=0, pad_to_multiple_of=8)(EXAMPLES)
    assert batch["input_ids"].shape == (4, 8)
    plain = PreferenceCollator(pad_token_id=0)(EXAMPLES)["completion_mask"]
    assert torch.equal(batch["completion_mask"][:, :7], plain)
    assert not batch["completion_mask"][:, 7:].any()
    assert PreferenceCollator(0, pad_to_multiple_of=7)(EXAMPLES)["input_ids"].shape == (4, 7)


def test_answer_masks_leave_gaps():
    example = EXAMPLES[0] | {
        "chosen_mask": [True, True],
        "rejected_mask": [True, False, False, True],
    }
    batch = PreferenceCollator(pad_token_id=0)([example])
    assert batch["completion_mask"].int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 1]]


def test_rows_are_optional():
    example = {k: v for k, v in EXAMPLES[0].items() if k != "row"}
    assert PreferenceCollator(0)([example])["rows"].tolist() == [-1]


def test_from_conversations_to_a_batch():
    tokenizer = chatml()
    rows = [
        {"chosen": turns("Why?", "So."), "rejected": turns("Why?", "I think so.")},
        {
            "chosen": turns("Who?", "I.", "No?", "Yes."),
            "rejected": turns("Who?", "Never."),
        },
    ]
    dataset = tokenize_preferences(rows, tokenizer).dataset
    batch = PreferenceCollator(tokenizer.pad_token_id)([dataset[0], dataset[1]])
    learned = [
        tokenizer.decode(ids[mask])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    end = "<|im_end|>"
    assert learned == [f"So.{end}", f"I.{end}Yes.{end}", f"I think so.{end}", f"Never.{end}"]
