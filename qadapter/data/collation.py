"""Tokenized pairs to padded batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def left_padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | None = None
) -> dict[str, Tensor]:
    """What ``generate`` takes of B prompts: `input_ids` and `attention_mask`, int64 [B, T]."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    starts = torch.tensor([[width - len(prompt)] for prompt in prompts], device=device)
    mask = torch.arange(width, device=device) >= starts
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": mask.long()}


@dataclass
class PreferenceCollator:
    """Pad B tokenized pairs to a batch of 2B rows: B chosen, then B rejected, padded on the right.

    What is an answer is told by position, never by id, so that an end of turn is learned also
    where the padding has the same id.

    Args:
        pad_token_id: fills `input_ids`; any id of the vocabulary will do.
        pad_to_multiple_of: round the padded length up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate examples with `prompt_ids`, `chosen_ids`, `rejected_ids`.

        Optional: `chosen_mask` and `rejected_mask` (which of the answer's tokens are the
        assistant's own; default all) and `row` (default -1).

        Returns:
            `input_ids` and `attention_mask` int64 [2B, T], `completion_mask` bool [2B, T],
            `rows` int64 [B].
        """
        sequences = [
            (e["prompt_ids"], e[f"{side}_ids"], e.get(f"{side}_mask"))
            for side in ("chosen", "rejected")
            for e in examples
        ]
        length = max(len(prompt) + len(answer) for prompt, answer, _ in sequences)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        shape = (len(sequences), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        completion_mask = torch.zeros(shape, dtype=torch.bool)
        for index, (prompt, answer, mask) in enumerate(sequences):
            start, end = len(prompt), len(prompt) + len(answer)
            input_ids[index, :start] = torch.as_tensor(prompt)
            input_ids[index, start:end] = torch.as_tensor(answer)
            attention_mask[index, :end] = 1
            completion_mask[index, start:end] = True if mask is None else torch.as_tensor(mask)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "rows": torch.tensor([e.get("row", -1) for e in examples], dtype=torch.int64),
        }
