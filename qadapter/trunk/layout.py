"""Where the tokens of many sequences lie in one row: no padding, and common beginnings once.

Shapes: N packed tokens, S sequences of at most T tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qadapter.trunk.gathering import Gathering
from qadapter.trunk.packed_attention import sees

_LIKE_LENGTH = 0.8
"""Sequences attend together if they are at least this share of the longest one's length."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of S sequences lie in one row of N. Sequences that begin alike share those
    tokens; the row is the tree of their beginnings, a branch after the other."""

    ids_N: Tensor
    positions_N: Tensor
    ends_N: Tensor
    """Where in the row the sequences that hold a token end: those after it and before are its
    continuations."""
    lines: list[Tensor]
    """Packed index of each sequence's tokens, S of [T], in the order the sequences were given; on
    the CPU."""
    blocks: list[Tensor]
    """The same for distinct sequences of like length, [S, T] each; what stands behind a sequence's
    end does not matter (attention is causal)."""
    block_places: Gathering
    """The packed tokens in all blocks, flattened and joined."""
    key_places: Gathering
    """The packed tokens in the lines of distinct sequences, joined in the order of the row."""
    query_offsets: Tensor
    """int32: where in the row each distinct sequence's own tokens begin, and N."""
    key_offsets: Tensor
    """int32: where its line begins in ``key_places``, and their number."""
    most_queries: int
    longest: int
    """Tokens of the longest sequence."""
    kernel: str = "blocks"
    windows: list[int | None] | None = None
    """Filled, where it is a list, with each attention's sliding window."""
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, sequences: Sequence[Tensor], device: torch.device | str | None = None, *,
        share: bool = True,
    ) -> Packing:
        """Lay out sequences of token ids, int64 [T] on the CPU each, T ≥ 1.

        Args:
            share: run common beginnings once; else every sequence is on its own.
        """
        texts = [np.asarray(ids) for ids in sequences]
        order, shared = list(range(len(texts))), [0] * len(texts)
        if share:
            # In the order of a dictionary a sequence shares most with the one before it.
            words = [ids.astype(">i8").tobytes() for ids in texts]
            order.sort(key=words.__getitem__)
            shared = [0, *(_common(texts[a], texts[b]) for a, b in itertools.pairwise(order))]
        lines: list[np.ndarray] = [np.empty(0)] * len(texts)
        distinct, own, start = [], [0], 0
        total = sum(map(len, texts)) - sum(shared)
        ids, positions = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
        ends = np.full(total, total)
        line = np.empty(0, dtype=np.int64)
        for number, common in zip(order, shared, strict=True):
            ends[line[common:]] = start
            stop = start + len(texts[number]) - common
            if stop > start:
                line = np.concatenate([line[:common], np.arange(start, stop)])
                ids[start:stop] = texts[number][common:]
                positions[start:stop] = np.arange(common, len(line))
                distinct.append(line)
                own.append(stop)
            lines[number] = line
            start = stop
        return cls._laid_out(ids, positions, ends, lines, distinct, own).to(device or "cpu")

    @classmethod
    def _laid_out(
        cls, ids: np.ndarray, positions: np.ndarray, ends: np.ndarray, lines: list[np.ndarray],
        distinct: list[np.ndarray], own: list[int],
    ) -> Packing:
        blocks, used, place = [], [], 0
        for alike in _by_length(distinct):
            width = len(alike[0])
            block = np.zeros((len(alike), width), dtype=np.int64)
            for row, line in zip(block, alike, strict=True):
                row[: len(line)] = line
                used.append(np.arange(place, place + len(line)))
                place += width
            blocks.append(block)
        keys = np.concatenate(distinct)
        lengths = [len(line) for line in distinct]
        joined = torch.from_numpy(np.concatenate(lines))
        return cls(
            *map(torch.from_numpy, (ids, positions, ends)),
            lines=list(joined.split([len(line) for line in lines])),
            blocks=[torch.from_numpy(block) for block in blocks],
            block_places=Gathering.of(
                np.concatenate([block.ravel() for block in blocks]), np.concatenate(used), len(ids)
            ),
            key_places=Gathering.of(keys, np.arange(len(keys)), len(ids)),
            query_offsets=torch.tensor(own, dtype=torch.int32),
            key_offsets=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
            most_queries=max(b - a for a, b in itertools.pairwise(own)),
            longest=max(lengths),
        )

    @property
    def places_N(self) -> Tensor:
        """For each packed token, one index into the blocks, flattened and joined, that holds it."""
        return self.block_places.first_N

    def gather(self, outputs: list[Tensor]) -> Tensor:
        """[N, ...] from one [S, T, ...] a block."""
        return torch.cat([x.flatten(0, 1) for x in outputs])[self.places_N]

    def collect(self, per_sequence: Sequence[Tensor]) -> Tensor:
        """[N, ...] from one [T, ...] a sequence, in the order the sequences were given; of what
        several hold, one's."""
        joined = torch.cat(list(per_sequence))
        owner_N = torch.empty(len(self.ids_N), dtype=torch.int64)
        owner_N[torch.cat(self.lines)] = torch.arange(len(joined))
        return joined[owner_N.to(joined.device)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        """The same on a device; ``lines`` stay on the CPU."""
        if self.ids_N.device == torch.device(device):
            return self
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packing:
        """The same in memory that is copied to a GPU without waiting."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, do: Callable[[Tensor], Tensor]) -> Packing:
        names = {f.name for f in dataclasses.fields(self)} - {"lines", "windows", "kept"}
        changed = {name: _mapped(getattr(self, name), do) for name in names}
        return dataclasses.replace(self, **changed, kept={})

    def band(self, length: int, window: int) -> Tensor:
        """Who sees whom in a sequence: a window back, bool [1, 1, T, T]."""
        key = length, window
        if key not in self.kept:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.ids_N.device)
            self.kept[key] = (seen.tril() & seen.triu(1 - window))[None, None]
        return self.kept[key]

    def flex_mask(self, missing: int, window: int | None) -> Any:
        """FlexAttention's mask, of the row and ``missing`` more tokens that see themselves."""
        key = "flex", missing, window
        if key not in self.kept:
            from torch.nn.attention.flex_attention import create_block_mask

            tokens, device = len(self.ids_N), self.ids_N.device
            rest = torch.arange(tokens, tokens + missing, device=device)
            # A mask made in inference mode could not be used by a backward later.
            with torch.inference_mode(False):
                ends = torch.cat([self.ends_N, rest + 1])
                positions = torch.nn.functional.pad(self.positions_N, (0, missing))
                self.kept[key] = create_block_mask(
                    sees(ends, positions, window), None, None, tokens + missing, tokens + missing,
                    device=device,
                )
        return self.kept[key]


def _mapped(value: Any, do: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(x, do) for x in value)
    if isinstance(value, Gathering):
        fields = {f.name: _mapped(getattr(value, f.name), do) for f in dataclasses.fields(value)}
        return Gathering(**fields)
    return value


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _by_length(lines: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    alike: list[np.ndarray] = []
    for line in sorted(lines, key=len, reverse=True):
        if alike and len(line) < _LIKE_LENGTH * len(alike[0]):
            yield alike
            alike = []
        alike.append(line)
    yield alike
