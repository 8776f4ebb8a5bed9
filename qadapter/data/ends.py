"""Where an answer ends."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.data.chat import learn_end_of_turn


def configured_ends(model: PreTrainedModel) -> set[int]:
    """The tokens that end an answer by the model's generation config."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the generation config's, the tokenizer's eos, and the one
    the chat template ends a turn with."""
    found = configured_ends(model) | {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        found.add(learn_end_of_turn(tokenizer).token_id)
    return sorted(found - {None})


def until_end(ids: list[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """What was generated up to the first token that ends it, that one included, and whether there
    is one."""
    stop = next((k for k, token in enumerate(ids) if token in ends), None)
    return (ids, False) if stop is None else (ids[: stop + 1], True)
