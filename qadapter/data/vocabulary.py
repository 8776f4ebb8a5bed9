"""Token ids and positions that a model has no embedding for, told before any batch is run.

A tokenizer may know tokens that its model does not: added ones without a resize, or those of
another model; and tables of positions (GPT-2's, OPT's) end. In a batch they are an index
error, or an assert on a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError

_PLACES = {
    "prompt_ids": "prompt", "chosen_ids": "chosen answer", "rejected_ids": "rejected answer",
}
_BATCH = 4096
_BEFORE_THE_FIRST = 2
"""Most rows that a table of positions holds before the first one's (OPT's)."""


def num_tokens(model: PreTrainedModel) -> int:
    """Ids from 0 that the model can read and predict. Rows beyond the tokenizer's are padding."""
    layers: tuple[Any, ...] = model.get_input_embeddings(), model.get_output_embeddings()
    return min(
        getattr(layer, "num_embeddings", None) or getattr(layer, "out_features", None)
        or layer.weight.shape[0]
        for layer in layers if layer is not None
    )


def configured_positions(model: PreTrainedModel) -> int | None:
    """Most tokens of a sequence that the model was made for, as its configuration says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def num_positions(model: PreTrainedModel) -> int | None:
    """Most tokens of a sequence that the model has positions for, as it looks them up in a table:
    learned (GPT-2, OPT) or not (GPT-J). None where it computes them: they may go on."""
    most = configured_positions(model)
    if most is None:
        return None
    tokens = model.get_input_embeddings()
    learned = (
        most <= table.num_embeddings <= most + _BEFORE_THE_FIRST
        for table in model.modules() if isinstance(table, nn.Embedding) and table is not tokens
    )
    computed = (
        len(x) == most for x in model.buffers() if x.ndim == 2 and x.is_floating_point()
    )
    return most if any(learned) or any(computed) else None


def padding_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The tokenizer's padding token where the model can read it, else 0: padding is masked."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None and pad < num_tokens(model) else 0


def check_pairs(
    dataset: Dataset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "the dataset",
) -> None:
    """Check tokenized pairs.

    Args:
        dataset: with `prompt_ids`, `chosen_ids`, `rejected_ids`, and possibly `row`.
        tokenizer: for messages.

    Raises:
        QAdapterError: an id without an embedding, a sequence with more tokens than the model has
            positions for; names it, its row, and the way out.
    """
    known = num_tokens(model)
    for column, place in _PLACES.items():
        start = 0
        for batch in dataset.select_columns([column]).with_format("arrow").iter(_BATCH):
            lists = batch[column].combine_chunks()
            found = pc.min_max(lists.flatten()).as_py()
            if found["max"] is not None and not 0 <= found["min"] <= found["max"] < known:
                index, token = _first_unknown(lists, known)
                row = _row(dataset, start + index)
                raise _unknown(token, known, tokenizer, f"{name}: the {place} of row {row}")
            start += len(lists)
    positions = num_positions(model)
    if positions is None:
        return
    start = 0
    for batch in dataset.select_columns(list(_PLACES)).with_format("arrow").iter(_BATCH):
        prompt, chosen, rejected = (pc.list_value_length(batch[column]) for column in _PLACES)
        lengths = pc.add(prompt, pc.max_element_wise(chosen, rejected))
        longest = pc.max(lengths).as_py()
        if longest > positions:
            row = _row(dataset, start + pc.index(lengths, longest).as_py())
            raise _too_long(longest, positions, f"{name}: row {row}")
        start += len(lengths)


def _row(dataset: Dataset, index: int) -> int:
    return dataset[index]["row"] if "row" in dataset.column_names else index


def check_pair(
    pair: Mapping[str, Any], known: int, positions: int | None,
    tokenizer: PreTrainedTokenizerBase | None, name: str,
) -> None:
    """`check_pairs` of one; `known`, `positions`: what the model has, `num_tokens` and
    `num_positions`."""
    for column, place in _PLACES.items():
        ids = pair[column]
        if ids and not 0 <= min(ids) <= max(ids) < known:
            token = next(token for token in ids if not 0 <= token < known)
            raise _unknown(token, known, tokenizer, f"{name}: the {place} of row {pair['row']}")
    prompt, chosen, rejected = (len(pair[column]) for column in _PLACES)
    if positions is not None and (length := prompt + max(chosen, rejected)) > positions:
        raise _too_long(length, positions, f"{name}: row {pair['row']}")


def _first_unknown(lists: pa.Array, known: int) -> tuple[int, int]:
    return next(
        (index, token) for index, ids in enumerate(lists.to_pylist()) for token in ids or ()
        if not 0 <= token < known
    )


def check_sequences(
    sequences: Iterable[Sequence[int]], model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None, name: str = "text", more: int = 0,
) -> None:
    """Check lists of token ids; `name` is what each of them is, `more` the tokens that are to come
    after each.

    Raises:
        QAdapterError: as `check_pairs`; names the list by its number, from 0.
    """
    known, most = num_tokens(model), configured_positions(model)
    for number, ids in enumerate(sequences):
        # A server asks at every request: the model's modules are looked through where they matter.
        if most is not None and len(ids) + more > most and num_positions(model) is not None:
            raise _too_long(len(ids), most, f"{name} {number}", more)
        if len(ids) and not 0 <= min(ids) <= max(ids) < known:
            token = next(token for token in ids if not 0 <= token < known)
            raise _unknown(token, known, tokenizer, f"{name} {number}")


def _unknown(
    token: int, known: int, tokenizer: PreTrainedTokenizerBase | None, where: str
) -> QAdapterError:
    size = 0 if tokenizer is None else len(tokenizer)
    if tokenizer is not None and 0 <= token < size:
        said = f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})"
        way_out = (
            "take the tokenizer that came with the base, or resize the base "
            f"(resize_token_embeddings({size})) and train it before an adapter is put on it"
        )
    else:
        said, way_out = f"id {token}", "token ids must be those of the base's own tokenizer"
    return QAdapterError(
        f"{where} holds the token {said}, and the model knows {known} tokens, ids 0 to "
        f"{known - 1}: {way_out}"
    )


def _too_long(length: int, positions: int, where: str, more: int = 0) -> QAdapterError:
    to_come = f" and {more:,} to come" if more else ""
    way_out = "fewer new tokens" if more else f"max_length {positions}"
    return QAdapterError(
        f"{where} has {length:,} tokens{to_come}, and the model has positions for {positions:,}: "
        f"shorten it, or take {way_out}"
    )
