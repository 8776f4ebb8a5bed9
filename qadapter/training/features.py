"""The one pass of the frozen base over a set of pairs, and what its outcome takes.

Nothing is padded and nothing runs twice: what texts begin with in common, a prompt above all, is
one run of tokens (``qadapter.trunk.packing``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from qadapter.data.columns import list_lengths, list_sums
from qadapter.policy.model import QAdapterModel
from qadapter.system.progress import Progress
from qadapter.training.feature_set import (
    SIDES,
    Answer,
    FeatureCollator,
    FeatureSet,
    Kept,
    PairFeatures,
    Shard,
    answers_of,
)
from qadapter.trunk.lm_head import input_device
from qadapter.trunk.packing import Packing, can_pack
from qadapter_kernels import linear_action_logit, linear_logsumexp
from qadapter_kernels.reference import accumulation_dtype

__all__ = [
    "FeatureCollator", "FeatureSet", "PairFeatures", "Shard", "Tokens", "compute_features",
    "compute_shard", "feature_bytes", "longest", "run_idly", "sizes", "token_counts",
]

_CAPPED_ROWS = 256
"""Rows of [rows, V] logits held at a time where a softcapped head rules out the fused kernel."""


def compute_features(
    model: QAdapterModel, dataset: Dataset, *, batch_tokens: int = 4096, pad_token_id: int = 0,
    packed: bool = True, progress: Progress | None = None,
) -> FeatureSet:
    """Run the base over tokenized pairs and keep the features in memory.

    Args:
        model: its base, head and objective are what counts, and which blocks its adapter is in.
        dataset: from ``qadapter.data.tokenize_preferences``.
        batch_tokens: most tokens in one batch of the trunk.
        pad_token_id: as the collator's; it is an action under ``mask_alignment="state"`` only.
        packed: run texts in one row, where the base's attention can; else in groups of like length.
        progress: called with (tokens done, tokens in all), of prompts and answers, so that the
            rate means the same in every run.
    """
    done = Tokens(int(token_counts(dataset).sum()), progress)
    shard = compute_shard(model, dataset, batch_tokens, pad_token_id, packed, done)
    return FeatureSet([shard], Kept.of(model))


class Tokens:
    """How many of all tokens the base has read.

    Args:
        total: tokens in all. progress: called with (done, total).
    """

    def __init__(self, total: int, progress: Progress | None = None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def feature_bytes(model: QAdapterModel, dataset: Dataset) -> np.ndarray:
    """What each pair's features take at most, in memory or on disk, int64 [P]; from token counts
    alone (what several pairs have in common is then kept once)."""
    kept, prompts, answers, actions = Kept.of(model), 0, 0, 0
    for side in SIDES:
        lengths = list_lengths(dataset, f"{side}_ids")
        masked = f"{side}_mask" in dataset.column_names
        answers = answers + lengths
        actions = actions + (list_sums(dataset, f"{side}_mask") if masked else lengths)
    if kept.ids:
        prompts = list_lengths(dataset, "prompt_ids")
    text = model.base.config.get_text_config()
    return sizes(
        kept, model.base.dtype, model.head.shape[1], text.hidden_size, prompts, answers,
        actions,
    )


Count = TypeVar("Count", int, np.ndarray)


def sizes(
    kept: Kept, dtype: torch.dtype, features: int, hidden: int, prompts: Count, answers: Count,
    actions: Count,
) -> Count:
    """Bytes of the features of a pair, or of each of several.

    Args:
        kept: which parts. dtype: of the base.
        features: width of what the head reads. hidden: of what enters a block.
        prompts: tokens of the pair's prompt. answers: of both answers. actions: of those that are
            scored.
    """
    number, int32 = accumulation_dtype(dtype).itemsize, torch.int32.itemsize
    action = number + 2 * int32 + (features * dtype.itemsize if kept.hidden else number)
    # Two offsets and two lengths, and the row.
    size = actions * action + 2 * (8 + 4) + 8
    if kept.ids:
        entering = 0 if kept.first_block is None else hidden * dtype.itemsize
        size = size + (prompts + answers) * (int32 + entering)
        size = size + (2 * prompts + answers) * int32  # the lines
    return size


def token_counts(dataset: Dataset) -> np.ndarray:
    """Tokens of both sequences of each pair, int64 [P]."""
    counts = np.zeros(len(dataset), dtype=np.int64)
    for name, times in (("prompt", 2), ("chosen", 1), ("rejected", 1)):
        counts += times * list_lengths(dataset, f"{name}_ids")
    return counts


def longest(dataset: Dataset | FeatureSet) -> int:
    """Tokens of the longest sequence of a set of pairs."""
    if isinstance(dataset, FeatureSet):
        return max((int(shard.lengths.max()) for shard in dataset.shards), default=0)
    prompt, *answers = (
        list_lengths(dataset, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return int((prompt + np.maximum(*answers)).max(initial=0))


class _Batch(NamedTuple):
    """Distinct texts that the base reads together."""

    packing: Packing
    members: list[list[int]]
    """For each text the sequences that it is (several pairs of one prompt may share an answer)."""


@torch.no_grad()
def compute_shard(
    model: QAdapterModel, dataset: Dataset, batch_tokens: int, pad_token_id: int, packed: bool,
    done: Tokens, most: Callable[[int], int] = lambda count: count,
) -> Shard:
    """Features of all pairs of ``dataset``; arguments as ``compute_features``.

    Args:
        most: gets the number of batches, gives how many every process runs of which the base is a
            collective (``Crew.most``).
    """
    kept, head, base = Kept.of(model), model.head, model.base
    alignment = model.objective.mask_alignment
    answers = [x for example in dataset for x in answers_of(example, alignment, pad_token_id)]
    batches = [_Batch(Packing.of(texts), m) for texts, m in _batches(answers, batch_tokens)]
    counts = torch.tensor([len(answer.states) for answer in answers])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    tokens = torch.from_numpy(np.concatenate([answer.tokens for answer in answers]))
    num_actions, width = int(offsets[-1]), head.shape[1]
    numbers = {"base_logsumexp": torch.empty(num_actions, dtype=accumulation_dtype(base.dtype))}
    if kept.hidden:
        numbers["hidden"] = torch.empty((num_actions, width), dtype=base.dtype)
    else:
        numbers["base_action_logit"] = torch.empty_like(numbers["base_logsumexp"])
    table = _token_table(kept, batches, answers, model)
    packed = packed and can_pack(base, max(len(answer.ids) for answer in answers)) is None
    start, idle_batches = 0, most(len(batches)) - len(batches)
    for packing, members in batches:
        features_MD, entering_MD = model.packed_base(
            packing.to(input_device(base)), packed=packed
        )
        if entering_MD is not None:
            table["entering"][start : start + len(entering_MD)] = entering_MD.to("cpu")
            start += len(entering_MD)
        places_N, actions_N = _actions(packing, members, answers, offsets)
        features_ND = features_MD[places_N.to(features_MD.device)]
        found = _numbers(
            model, model.base_stream(features_ND), tokens[actions_N].to(features_ND.device)
        )
        for name, x in ({"hidden": features_ND} | found).items():
            if name in numbers:
                numbers[name][actions_N] = x.to("cpu", numbers[name].dtype)
        done.add(sum(len(answers[n].ids) for text in members for n in text))
    run_idly(model, idle_batches, packed)
    return Shard(
        tokens=tokens,
        states=torch.from_numpy(np.concatenate([answer.states for answer in answers])),
        offsets=offsets,
        lengths=torch.tensor([len(answer.ids) for answer in answers], dtype=torch.int32),
        rows=torch.tensor(
            dataset["row"][:] if "row" in dataset.column_names else range(len(dataset))
        ),
        **numbers, **table,
    )


@torch.no_grad()
def run_idly(model: QAdapterModel, batches: int, packed: bool) -> None:
    """Run the base as often on one token: what others compute meanwhile needs its part of it."""
    one = Packing.of([torch.zeros(1, dtype=torch.int64)])
    for _ in range(batches):
        model.packed_base(one.to(input_device(model.base)), packed=packed)


def _token_table(
    kept: Kept, batches: Sequence[_Batch], answers: Sequence[Answer], model: QAdapterModel
) -> dict[str, Tensor]:
    """The parts of a shard that are kept for tokens; ``entering`` is still to be filled."""
    if not kept.ids:
        return {}
    lines: list[Tensor] = [torch.empty(0)] * len(answers)
    start = 0
    for packing, members in batches:
        for line, sequences in zip(packing.lines, members, strict=True):
            for number in sequences:
                lines[number] = line + start
        start += len(packing.ids_N)
    table = {
        "ids": torch.cat([packing.ids_N for packing, _ in batches]).int(),
        "lines": torch.cat(lines).int(),
    }
    if kept.first_block is not None:
        width = model.base.config.get_text_config().hidden_size
        table["entering"] = torch.empty((start, width), dtype=model.base.dtype)
    return table


def _actions(
    packing: Packing, members: list[list[int]], answers: Sequence[Answer], offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Where in the packed row each action's state is, and which of all actions it is, [N] each."""
    sequences = [
        (line, number) for line, numbers in zip(packing.lines, members, strict=True)
        for number in numbers
    ]
    places = [line[torch.from_numpy(answers[n].states).long()] for line, n in sequences]
    actions = [torch.arange(offsets[n], offsets[n + 1]) for _, n in sequences]
    return torch.cat(places), torch.cat(actions)


def _batches(
    answers: Sequence[Answer], batch_tokens: int
) -> Iterator[tuple[list[Tensor], list[list[int]]]]:
    """Batches of distinct texts, and for each text the sequences that it is. Longest first; answers
    to one prompt stay together.
    """
    uses: dict[bytes, dict[bytes, list[int]]] = {}
    for number, answer in enumerate(answers):
        prompt = answer.ids[: answer.prompt_length].tobytes()
        uses.setdefault(prompt, {}).setdefault(answer.ids.tobytes(), []).append(number)

    def length(numbers: list[int]) -> int:
        return len(answers[numbers[0]].ids)

    prompts = sorted(
        (list(texts.values()) for texts in uses.values()),
        key=lambda texts: max(map(length, texts)), reverse=True,
    )
    batch: list[list[int]] = []
    for texts in prompts:
        longest = max(map(length, [*batch, *texts]))
        if batch and longest * (len(batch) + len(texts)) > batch_tokens:
            yield _texts(answers, batch), batch
            batch = []
        batch = batch + texts
    yield _texts(answers, batch), batch


def _texts(answers: Sequence[Answer], members: list[list[int]]) -> list[Tensor]:
    return [torch.from_numpy(answers[numbers[0]].ids).long() for numbers in members]


def _numbers(model: QAdapterModel, hidden_ND: Tensor, tokens_N: Tensor) -> dict[str, Tensor]:
    """b[action] and lse(b), [N] each."""
    head = model.head
    if head.softcap is None:
        found = {"hidden": hidden_ND, "actions": tokens_N, **head.operands}
        return {
            "base_action_logit": linear_action_logit(**found),
            "base_logsumexp": linear_logsumexp(**found),
        }
    logits, lses = [], []
    for hidden_RD, tokens_R in zip(
        hidden_ND.split(_CAPPED_ROWS), tokens_N.split(_CAPPED_ROWS), strict=True
    ):
        logits_RV = head(hidden_RD)
        logits_RV = logits_RV.to(accumulation_dtype(logits_RV.dtype))
        logits.append(logits_RV.gather(1, tokens_R.long()[:, None])[:, 0])
        lses.append(logits_RV.logsumexp(-1))
    return {"base_action_logit": torch.cat(logits), "base_logsumexp": torch.cat(lses)}
