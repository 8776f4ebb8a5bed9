"""docs/pitfalls.md: numbered through, short, and what it says of numbers is so."""

from __future__ import annotations

import re

import torch
from pages import read

from qadapter.objective import find_actions


def test_pitfalls_are_numbered_through_and_short():
    items = re.findall(r"^(\d+)\. ((?:.+\n)(?: {2,}.+\n)*)", read("docs/pitfalls.md"), re.MULTILINE)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    assert len(items) >= 30
    assert [number for number, text in items if text.count("\n") > 3] == []


def test_position_0_is_no_action_and_the_mask_stands_at_the_answer():
    ids = torch.tensor([[7, 8, 9], [7, 8, 9]])
    actions = find_actions(ids, torch.tensor([[1, 0, 1], [0, 1, 0]]))
    assert actions.token_N.tolist() == [9, 8] and actions.state_N.tolist() == [1, 0]


def test_what_16_bits_hold():
    near_10 = torch.tensor(10.0, dtype=torch.bfloat16)
    step = torch.nextafter(near_10, torch.tensor(16.0, dtype=torch.bfloat16)) - near_10
    assert round(step.item(), 2) == 0.06
    assert torch.finfo(torch.float16).max in range(65_504, 65_505)
    weight = torch.tensor(1.0, dtype=torch.bfloat16)
    assert weight + 3e-4 == weight
