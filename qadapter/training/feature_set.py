"""What the frozen base says about every action of a set of pairs, and batches of it.

Which parts are kept depends on the adapter (``Kept``). A head adapter sees nothing but its features
(``QAdapterModel.features``) at the states actions are taken in. A LoRA runs the trunk itself, on
the tokens; of the base its loss needs b[action] and lse(b) where the base's logits have no weight
in the policy, else h_b. Where all its layers sit in the upper blocks, the states that enter the
lowest of those are kept too, and training runs those blocks alone.

Shapes: P pairs, 2P sequences (pair i's chosen and rejected are sequences 2i and 2i + 1), N actions
in all, M distinct tokens (what sequences begin with in common is there once), D hidden.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.packing import Packing

SIDES = ("chosen", "rejected")


class Kept(NamedTuple):
    """Which parts are kept for an adapter."""

    hidden: bool
    """Features, of which h_b is made; else b[action] stands for it."""
    ids: bool = False
    """Token ids: the trunk runs at every step."""
    first_block: int | None = None
    """The block whose entering states are kept."""
    before_norm: bool = False
    """Whether the features are the states that enter the final norm, not h_b."""

    @classmethod
    def of(cls, model: QAdapterModel) -> Kept:
        if not model.adapts_trunk:
            return cls(hidden=True, before_norm=model.reads_before_norm)
        split = model.split_trunk
        return cls(
            hidden=model.objective.coefficients.base_weight != 0, ids=True,
            first_block=None if split is None else split.first_block,
        )

    def __str__(self) -> str:
        parts = ["hidden states" if self.hidden else "two numbers a token"]
        if self.before_norm:
            parts = ["the states before the final norm"]
        if self.ids:
            parts.append("token ids")
        if self.first_block is not None:
            parts.append(f"the states that enter block {self.first_block}")
        return ", ".join(parts)


class Shard(NamedTuple):
    """Features of consecutive pairs; all tensors on the CPU. What is not kept is None."""

    base_logsumexp: Tensor
    """lse(b) [N], float32 (float64 for a float64 base)."""
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
    hidden: Tensor | None = None
    """Features [N, D] in the base's dtype."""
    base_action_logit: Tensor | None = None
    """b[action] [N], like ``base_logsumexp``."""
    ids: Tensor | None = None
    """Token ids, int32 [M]."""
    entering: Tensor | None = None
    """States that enter the first adapted block, [M, D] in the base's dtype."""
    lines: Tensor | None = None
    """Of each sequence's tokens, one sequence after the other, the places in ``ids``, int32."""

    def parts(self) -> dict[str, Tensor]:
        """Those that are kept, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}


class PairFeatures(NamedTuple):
    """One pair: its chosen answer's actions, then its rejected answer's. [N, …] tensors as in
    ``Shard``; those of tokens are one a sequence, [T, …]."""

    row: int
    base_logsumexp: Tensor
    tokens: Tensor
    states: Tensor
    num_actions: tuple[int, int]
    lengths: tuple[int, int]
    hidden: Tensor | None = None
    base_action_logit: Tensor | None = None
    ids: tuple[Tensor, Tensor] | None = None
    entering: tuple[Tensor, Tensor] | None = None


_PER_ACTION = ("base_logsumexp", "tokens", "hidden", "base_action_logit")


class FeatureSet(torch.utils.data.Dataset):
    """Cached features of a set of pairs, in memory or mapped from disk. Items: ``PairFeatures``.

    Build with ``compute_features`` or ``qadapter.training.feature_store.load_or_compute``.
    """

    def __init__(self, shards: Sequence[Shard], kept: Kept) -> None:
        self.shards, self.kept = list(shards), kept
        self._starts = np.cumsum([0, *(len(s.rows) for s in self.shards)]).tolist()
        self._line_starts = [
            None if s.lines is None else
            np.concatenate([[0], np.cumsum(s.lengths.numpy(), dtype=np.int64)])
            for s in self.shards
        ]

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
            states=shard.states[start:end],
            num_actions=(middle - start, end - middle),
            lengths=tuple(shard.lengths[2 * local : 2 * local + 2].tolist()),
            **{
                name: x[start:end] for name in _PER_ACTION
                if (x := getattr(shard, name)) is not None
            },
            **self._tokens(number, local),
        )

    def _tokens(self, number: int, local: int) -> dict[str, tuple[Tensor, Tensor]]:
        shard, starts = self.shards[number], self._line_starts[number]
        if starts is None:
            return {}
        lines = [shard.lines[starts[s] : starts[s + 1]] for s in (2 * local, 2 * local + 1)]
        return {
            name: tuple(x[line] for line in lines)
            for name in ("ids", "entering") if (x := getattr(shard, name)) is not None
        }

    def base_states(self, index: int) -> tuple[Tensor, Tensor]:
        """Features [K, D] at the actions of a pair's chosen and of its rejected answer."""
        pair = self[index]
        return pair.hidden.split(pair.num_actions)

    def select(self, indices: Sequence[int]) -> FeatureSet:
        """A copy of these pairs' features, in this order, in memory."""
        pairs = [self[i] for i in indices]
        counts = torch.tensor([n for pair in pairs for n in pair.num_actions], dtype=torch.int64)
        joined = {
            name: torch.cat([getattr(pair, name) for pair in pairs])
            for name in (*_PER_ACTION, "states") if getattr(pairs[0], name) is not None
        }
        if pairs[0].ids is not None:
            sequences = [ids for pair in pairs for ids in pair.ids]
            packing = Packing.of(sequences)
            joined |= {"ids": packing.ids_N.int(), "lines": torch.cat(packing.lines).int()}
            if pairs[0].entering is not None:
                joined["entering"] = packing.collect([x for p in pairs for x in p.entering])
        shard = Shard(
            **joined,
            offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            lengths=torch.tensor([pair.lengths for pair in pairs], dtype=torch.int32).flatten(),
            rows=torch.tensor([pair.row for pair in pairs]),
        )
        return FeatureSet([shard], self.kept)

    def check(self, model: QAdapterModel, what: str) -> None:
        """Whether these are features for a model's adapter.

        Args:
            what: they are, for the error's text.

        Raises:
            QAdapterError: other parts of what the base says were kept.
        """
        wanted = Kept.of(model)
        if self.kept != wanted:
            raise QAdapterError(
                f"{what} are features that keep {self.kept}, this adapter needs {wanted}: compute "
                "them for a model with this adapter"
            )

    @property
    def num_actions(self) -> int:
        return sum(len(shard.tokens) for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Memory (or disk space) of all features."""
        return sum(x.nbytes for shard in self.shards for x in shard.parts().values())


@dataclass
class FeatureCollator:
    """B pairs to one ragged batch: the actions of B chosen, then of B rejected answers.

    Returns ``rows`` [B], ``tokens`` int64 [N], ``offsets`` int64 [2B + 1], ``padded_length`` (the
    length T a padded batch would have), ``num_tokens`` (prompts and answers), and of the base
    ``base_logsumexp`` [N] with ``hidden`` [N, D] or ``base_action_logit`` [N]. What a padded batch
    would not score, the output at its last position T − 1, is left out here too
    (``mask_alignment="state"``).

    For a LoRA also ``packing``, a ``Packing`` of the 2B sequences, ``states`` int64 [N], where in
    it each action's state is, ``packed``, whether it runs as one row, and ``entering``, the states
    [M, D] that its first adapted block sees, where those are kept.

    Args:
        pad_to_multiple_of: of T.
        packed: see above. share: whether sequences share what they begin with.
    """

    pad_to_multiple_of: int | None = None
    packed: bool = False
    share: bool = True

    def __call__(self, pairs: Sequence[PairFeatures]) -> dict[str, Any]:
        ordered = [(pair, side) for side in range(2) for pair in pairs]
        pieces = [
            slice(0, pair.num_actions[0]) if side == 0 else slice(pair.num_actions[0], None)
            for pair, side in ordered
        ]

        def joined(name: str) -> Tensor:
            return torch.cat([
                getattr(pair, name)[piece]
                for (pair, _), piece in zip(ordered, pieces, strict=True)
            ])

        positions = [pair.states[piece] for (pair, _), piece in zip(ordered, pieces, strict=True)]
        batch = {name: joined(name) for name in _PER_ACTION if getattr(pairs[0], name) is not None}
        tokens_of_trunk: dict[str, Any] = {}
        if pairs[0].ids is not None:
            packing, batch["states"] = pack(
                [pair.ids[side] for pair, side in ordered], positions, self.share
            )
            tokens_of_trunk = {"packing": packing, "packed": self.packed}
            if pairs[0].entering is not None:
                tokens_of_trunk["entering"] = packing.collect(
                    [pair.entering[side] for pair, side in ordered]
                )
        return ragged(
            [pair.row for pair in pairs], batch, positions,
            [pair.lengths[side] for pair, side in ordered], self.pad_to_multiple_of,
        ) | tokens_of_trunk


@dataclass
class PackedCollator:
    """B tokenized pairs to the batch that ``FeatureCollator`` makes for a LoRA, without what the
    base says: it runs at every step.

    Args:
        mask_alignment: the objective's. pad_token_id: what follows a sequence's end; it is an
            action under ``mask_alignment="state"`` only. The others: as ``FeatureCollator``'s.
    """

    mask_alignment: str
    pad_token_id: int
    pad_to_multiple_of: int | None = None
    packed: bool = False
    share: bool = True

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        answers = [answers_of(x, self.mask_alignment, self.pad_token_id) for x in examples]
        ordered = [pair[side] for side in range(2) for pair in answers]
        positions = [torch.from_numpy(answer.states) for answer in ordered]
        packing, states = pack(
            [torch.from_numpy(answer.ids) for answer in ordered], positions, self.share
        )
        tokens = torch.cat([torch.from_numpy(answer.tokens) for answer in ordered])
        return ragged(
            [x.get("row", -1) for x in examples], {"states": states, "tokens": tokens}, positions,
            [len(answer.ids) for answer in ordered], self.pad_to_multiple_of,
        ) | {"packing": packing, "packed": self.packed}


def pack(
    sequences: Sequence[Tensor], positions: Sequence[Tensor], share: bool = True
) -> tuple[Packing, Tensor]:
    """Sequences of token ids in one row, and where in it the given positions of each are, [N]."""
    packing = Packing.of([ids.long() for ids in sequences], share=share)
    places = [line[p.long()] for line, p in zip(packing.lines, positions, strict=True)]
    return packing, torch.cat(places)


def ragged(
    rows: Sequence[int], per_action: dict[str, Tensor], positions: Sequence[Tensor],
    lengths: Sequence[int], multiple: int | None,
) -> dict[str, Any]:
    """The parts of a batch that do not depend on the adapter. ``rows`` comes first: a batch's size
    is read off its first tensor.

    Args:
        rows: [B]. per_action: tensors [N, …]. positions: states of each sequence.
        lengths: tokens of each sequence. multiple: of the padded length.
    """
    padded_length = -(-max(lengths) // (multiple or 1)) * (multiple or 1)
    counts = torch.tensor([len(states) for states in positions])
    scored = torch.cat(list(positions)) < padded_length - 1
    if not scored.all():
        sequence = torch.arange(len(counts)).repeat_interleave(counts)
        counts = torch.bincount(sequence[scored], minlength=len(counts))
        per_action = {name: x[scored] for name, x in per_action.items()}
    return {
        "rows": torch.tensor(rows),
        **per_action,
        "tokens": per_action["tokens"].to(torch.int64),
        "offsets": torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        "padded_length": padded_length,
        "num_tokens": sum(lengths),
    }


class Answer(NamedTuple):
    """One answer behind its prompt."""

    ids: np.ndarray
    """Of both, int32 [T]."""
    prompt_length: int
    tokens: np.ndarray
    """The actions, int32."""
    states: np.ndarray
    """Positions of their states, int32."""


def answers_of(
    example: Mapping[str, Any], mask_alignment: str, pad_token_id: int
) -> tuple[Answer, Answer]:
    """The chosen and the rejected answer of a tokenized pair; arguments as ``PackedCollator``'s."""
    prompt, found = example["prompt_ids"], []
    for side in SIDES:
        answer, mask = example[f"{side}_ids"], example.get(f"{side}_mask")
        ids = np.array([*prompt, *answer, pad_token_id], dtype=np.int32)
        positions = len(prompt) + (
            np.arange(len(answer)) if mask is None else np.flatnonzero(mask)
        )
        states = positions - 1 if mask_alignment == "action" else positions
        states = states[states >= 0].astype(np.int32)
        found.append(Answer(ids[:-1], len(prompt), ids[states + 1], states))
    return tuple(found)
