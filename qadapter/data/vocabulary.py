"""Token ids that a model has no embedding for, told before any batch is run.

A tokenizer may know tokens that its model does not: added ones without a resize, or those of
another model. In a batch they are an index error, or an assert on a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError

_PLACES = {
    "prompt_ids": "prompt", "chosen_ids": "chosen answer", "rejected_ids": "rejected answer",
}
_BATCH = 4096


def num_tokens(model: PreTrainedModel) -> int:
    """Ids from 0 that the model can read and predict. Rows beyond the tokenizer's are padding."""
    layers: tuple[Any, ...] = model.get_input_embeddings(), model.get_output_embeddings()
    return min(
        getattr(layer, "num_embeddings", None) or getattr(layer, "out_features", None)
        or layer.weight.shape[0]
        for layer in layers if layer is not None
    )


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
        QAdapterError: an id without an embedding; names it, its row, and the way out.
    """
    known = num_tokens(model)
    for column, place in _PLACES.items():
        start = 0
        for batch in dataset.select_columns([column]).with_format("arrow").iter(_BATCH):
            lists = batch[column].combine_chunks()
            found = pc.min_max(lists.flatten()).as_py()
            if found["max"] is not None and not 0 <= found["min"] <= found["max"] < known:
                index, token = _first_unknown(lists, known)
                index += start
                row = dataset[index]["row"] if "row" in dataset.column_names else index
                raise _unknown(token, known, tokenizer, f"{name}: the {place} of row {row}")
            start += len(lists)


def check_pair(
    pair: Mapping[str, Any], known: int, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> None:
    """`check_pairs` of one; `known`: ids from 0 that the model has, `num_tokens`."""
    for column, place in _PLACES.items():
        ids = pair[column]
        if ids and not 0 <= min(ids) <= max(ids) < known:
            token = next(token for token in ids if not 0 <= token < known)
            raise _unknown(token, known, tokenizer, f"{name}: the {place} of row {pair['row']}")


def _first_unknown(lists: pa.Array, known: int) -> tuple[int, int]:
    return next(
        (index, token) for index, ids in enumerate(lists.to_pylist()) for token in ids or ()
        if not 0 <= token < known
    )


def check_sequences(
    sequences: Iterable[Sequence[int]], model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None, name: str = "text",
) -> None:
    """Check lists of token ids; `name` is what each of them is.

    Raises:
        QAdapterError: as `check_pairs`; names the list by its number, from 0.
    """
    known = num_tokens(model)
    for number, ids in enumerate(sequences):
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
