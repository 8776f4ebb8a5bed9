"""What train and eval show of what they measured."""

from __future__ import annotations

import pytest
from datasets import Dataset

from qadapter.commands.measuring import _written_prompts

ASKED = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize("prompt, shown", [
    ("Why?", "Why?"),
    ([ASKED], "Why?"),
    ([{"role": "system", "content": "Be short."}, ASKED], "system: Be short.\n\nuser: Why?"),
    ([{"role": "user", "content": "Hm."}, {"role": "assistant", "content": "Yes?"}, ASKED],
     "user: Hm.\n\nassistant: Yes?\n\nuser: Why?"),
    ([{"role": "user", "content": None}], None),
    ("", None),
])
def test_a_prompt_is_shown_with_all_that_was_said(prompt, shown):
    pairs = Dataset.from_list([{"prompt_id": "a", "prompt": prompt}])
    assert _written_prompts(pairs).get("a") == shown
