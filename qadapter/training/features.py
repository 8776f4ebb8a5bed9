"""What the frozen base knows about every action, computed once.

A head adapter sees nothing but the base's last hidden states at the states actions are taken in
(design §5). They, their log-sum-exps and the action tokens are all that training and evaluation
need; the trunk never runs again.

Shapes: P pairs, 2P sequences (pair i's chosen and rejected are sequences 2i and 2i + 1), N actions
in all, D hidden.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.system.progress import Progress
from qadapter.trunk.lm_head import input_device
from qadapter.trunk.packing import Packing, can_pack, hidden_states
from qadapter_kernels import linear_logsumexp

_SIDES = ("chosen", "rejected")
_CAPPED_ROWS = 256
"""Rows of [rows, V] logits held at a time where a softcapped head rules out the fused kernel."""


class Shard(NamedTuple):
    """Features of consecutive pairs; all tensors on the CPU."""

    hidden: Tensor
    """h_b [N, D] in the base's dtype."""
    base_logsumexp: Tensor
    """lse(b) [N], float32."""
    tokens: Tensor
    """The actions, int32 [N]."""
    states: Tensor
    """Position in its sequence of the output that scores each action, int32 [N]."""
    offsets: Tensor
    """int64 [2P + 1]: sequence s owns actions offsets[s]:offsets[s + 1]."""
    lengths: Tensor
    """Tokens of each sequence, prompt and answer, int32 [2P]."""
    rows: Tensor
    """Row of each pair in its source, int64 [P]."""


class PairFeatures(NamedTuple):
    """One pair: its chosen answer's actions, then its rejected answer's."""

    row: int
    hidden: Tensor
    base_logsumexp: Tensor
    tokens: Tensor
    states: Tensor
    num_actions: tuple[int, int]
    lengths: tuple[int, int]


class FeatureSet(torch.utils.data.Dataset):
    """Cached features of a set of pairs, in memory or mapped from disk. Items: ``PairFeatures``.

    Build with ``compute_features`` or ``qadapter.training.feature_store.load_or_compute``.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self._starts = np.cumsum([0, *(len(s.rows) for s in self.shards)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> PairFeatures:
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        shard, local = self.shards[number], index - self._starts[number]
        start, middle, end = shard.offsets[2 * local : 2 * local + 3].tolist()
        return PairFeatures(
            row=int(shard.rows[local]),
            hidden=shard.hidden[start:end],
            base_logsumexp=shard.base_logsumexp[start:end],
            tokens=shard.tokens[start:end],
            states=shard.states[start:end],
            num_actions=(middle - start, end - middle),
            lengths=tuple(shard.lengths[2 * local : 2 * local + 2].tolist()),
        )

    def select(self, indices: Sequence[int]) -> FeatureSet:
        """A copy of these pairs' features, in this order, in memory."""
        pairs = [self[i] for i in indices]
        counts = torch.tensor([n for pair in pairs for n in pair.num_actions], dtype=torch.int64)
        return FeatureSet([
            Shard(
                **{
                    name: torch.cat([getattr(pair, name) for pair in pairs])
                    for name in ("hidden", "base_logsumexp", "tokens", "states")
                },
                offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
                lengths=torch.tensor([pair.lengths for pair in pairs], dtype=torch.int32).flatten(),
                rows=torch.tensor([pair.row for pair in pairs]),
            )
        ])

    @property
    def num_actions(self) -> int:
        return sum(len(shard.tokens) for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Memory (or disk space) of all features."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)


@dataclass
class FeatureCollator:
    """B pairs to one ragged batch: the actions of B chosen, then of B rejected answers.

    Returns ``rows`` [B], ``hidden`` [N, D], ``base_logsumexp`` [N], ``tokens`` int64 [N],
    ``offsets`` int64 [2B + 1], ``padded_length`` (the length T a padded batch would have) and
    ``num_tokens`` (prompts and answers). What a padded batch would not score, the output at its
    last position T − 1, is left out here too (``mask_alignment="state"``).
    """

    pad_to_multiple_of: int | None = None

    def __call__(self, pairs: Sequence[PairFeatures]) -> dict[str, Any]:
        multiple = self.pad_to_multiple_of or 1
        padded_length = -(-max(max(pair.lengths) for pair in pairs) // multiple) * multiple
        pieces = [
            slice(0, pair.num_actions[0]) if side == 0 else slice(pair.num_actions[0], None)
            for side in range(2)
            for pair in pairs
        ]
        sequences = list(zip(pieces, [*pairs, *pairs], strict=True))
        states = torch.cat([pair.states[piece] for piece, pair in sequences])
        counts = torch.tensor([len(pair.states[piece]) for piece, pair in sequences])
        batch = {
            name: torch.cat([getattr(pair, name)[piece] for piece, pair in sequences])
            for name in ("hidden", "base_logsumexp", "tokens")
        }
        scored = states < padded_length - 1
        if not scored.all():
            sequence = torch.arange(len(counts)).repeat_interleave(counts)
            counts = torch.bincount(sequence[scored], minlength=len(counts))
            batch = {name: x[scored] for name, x in batch.items()}
        return {
            "rows": torch.tensor([pair.row for pair in pairs]),
            **batch,
            "tokens": batch["tokens"].to(torch.int64),
            "offsets": torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            "padded_length": padded_length,
            "num_tokens": sum(sum(pair.lengths) for pair in pairs),
        }


def compute_features(
    model: QAdapterModel, dataset: Dataset, *, batch_tokens: int = 4096, pad_token_id: int = 0,
    progress: Progress | None = None,
) -> FeatureSet:
    """Run the base over tokenized pairs and keep the features in memory.

    Args:
        model: its base, head and ``objective.mask_alignment`` are what counts.
        dataset: from ``qadapter.data.tokenize_preferences``.
        batch_tokens: most tokens in one batch of the trunk.
        pad_token_id: as the collator's; it is an action under ``mask_alignment="state"`` only.
        progress: called with (tokens done, tokens in all), of prompts and answers, so that the
            rate means the same in every run.
    """
    done = Tokens(int(token_counts(dataset).sum()), progress)
    return FeatureSet([compute_shard(model, dataset, batch_tokens, pad_token_id, done)])


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
    """What each pair's features take, in memory or on disk, int64 [P]; from token counts alone."""
    scalars = sum(
        torch.empty(0, dtype=dtype).itemsize for dtype in (torch.float32, torch.int32, torch.int32)
    )
    row = model.head.weight.shape[1] * model.base.dtype.itemsize + scalars
    actions = np.zeros(len(dataset), dtype=np.int64)
    for side in _SIDES:
        name = f"{side}_mask" if f"{side}_mask" in dataset.column_names else f"{side}_ids"
        count = sum if name.endswith("mask") else len
        actions += np.fromiter(map(count, dataset[name]), dtype=np.int64, count=len(dataset))
    # Two offsets and two lengths, and the row.
    return actions * row + 2 * (8 + 4) + 8


def token_counts(dataset: Dataset) -> np.ndarray:
    """Tokens of both sequences of each pair, int64 [P]."""
    counts = np.zeros(len(dataset), dtype=np.int64)
    for name, times in (("prompt", 2), ("chosen", 1), ("rejected", 1)):
        ids = dataset[f"{name}_ids"]
        counts += times * np.fromiter((len(x) for x in ids), dtype=np.int64, count=len(dataset))
    return counts


@torch.no_grad()
def compute_shard(
    model: QAdapterModel, dataset: Dataset, batch_tokens: int, pad_token_id: int, done: Tokens
) -> Shard:
    """Features of all pairs of ``dataset``; arguments as ``compute_features``."""
    if model.adapts_trunk:
        raise QAdapterError("an adapter in the trunk sees more than the base's features")
    sequences = _sequences(dataset, model.objective.mask_alignment, pad_token_id)
    counts = torch.tensor([len(sequence.states) for sequence in sequences])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    head, total = model.head, int(offsets[-1])
    hidden = torch.empty((total, head.weight.shape[1]), dtype=model.base.dtype)
    base_logsumexp = torch.empty(total)
    tokens = torch.from_numpy(np.concatenate([sequence.tokens for sequence in sequences]))
    states = torch.from_numpy(np.concatenate([sequence.states for sequence in sequences]))
    longest = max(len(sequence.ids) for sequence in sequences)
    packed = can_pack(model.base, longest) is None
    for texts, members in _batches(sequences, batch_tokens):
        packing = Packing.of(texts, input_device(model.base))
        rows_N = torch.cat(
            [
                line[sequences[number].states]
                for line, numbers in zip(packing.lines, members, strict=True)
                for number in numbers
            ]
        )
        numbers = [number for numbers in members for number in numbers]
        targets_N = torch.cat([torch.arange(offsets[n], offsets[n + 1]) for n in numbers])
        hidden_TD = hidden_states(model.base, packing, packed=packed).to(head.weight.device)
        hidden_ND = hidden_TD[rows_N.to(head.weight.device)]
        hidden[targets_N] = hidden_ND.to("cpu")
        base_logsumexp[targets_N] = _logsumexp(model, hidden_ND, tokens[targets_N]).to("cpu")
        done.add(sum(len(sequences[number].ids) for number in numbers))
    return Shard(
        hidden, base_logsumexp, tokens, states, offsets,
        torch.tensor([len(sequence.ids) for sequence in sequences], dtype=torch.int32),
        torch.tensor(dataset["row"][:] if "row" in dataset.column_names else range(len(dataset))),
    )


class _Sequence(NamedTuple):
    ids: np.ndarray
    prompt_length: int
    tokens: np.ndarray
    states: np.ndarray


def _sequences(dataset: Dataset, mask_alignment: str, pad_token_id: int) -> list[_Sequence]:
    sequences = []
    for example in dataset:
        prompt_length = len(example["prompt_ids"])
        for side in _SIDES:
            answer, mask = example[f"{side}_ids"], example.get(f"{side}_mask")
            ids = np.array([*example["prompt_ids"], *answer, pad_token_id], dtype=np.int32)
            positions = prompt_length + (
                np.arange(len(answer)) if mask is None else np.flatnonzero(mask)
            )
            states = positions - 1 if mask_alignment == "action" else positions
            states = states[states >= 0].astype(np.int32)
            sequences.append(_Sequence(ids[:-1], prompt_length, ids[states + 1], states))
    return sequences


def _batches(
    sequences: Sequence[_Sequence], batch_tokens: int
) -> Iterator[tuple[list[Tensor], list[list[int]]]]:
    """Batches of distinct texts, and for each text the sequences that it is (several pairs of one
    prompt often share an answer). Longest first; answers to one prompt stay together.
    """
    uses: dict[bytes, dict[bytes, list[int]]] = {}
    for number, sequence in enumerate(sequences):
        prompt = sequence.ids[: sequence.prompt_length].tobytes()
        uses.setdefault(prompt, {}).setdefault(sequence.ids.tobytes(), []).append(number)

    def length(numbers: list[int]) -> int:
        return len(sequences[numbers[0]].ids)

    prompts = sorted(
        (list(texts.values()) for texts in uses.values()),
        key=lambda texts: max(map(length, texts)), reverse=True,
    )
    batch: list[list[int]] = []
    for texts in prompts:
        longest = max(map(length, [*batch, *texts]))
        if batch and longest * (len(batch) + len(texts)) > batch_tokens:
            yield _texts(sequences, batch), batch
            batch = []
        batch = batch + texts
    yield _texts(sequences, batch), batch


def _texts(sequences: Sequence[_Sequence], members: list[list[int]]) -> list[Tensor]:
    return [torch.from_numpy(sequences[numbers[0]].ids).long() for numbers in members]


def _logsumexp(model: QAdapterModel, hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
    head = model.head
    if head.softcap is None:
        return linear_logsumexp(
            hidden_ND, head.weight, tokens_N.to(hidden_ND.device), bias=head.bias,
            logit_scale=head.logit_scale,
        )
    return torch.cat([head(h).float().logsumexp(-1) for h in hidden_ND.split(_CAPPED_ROWS)])
