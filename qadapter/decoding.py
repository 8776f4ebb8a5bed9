"""Decoding two streams in one forward: a batch of B rows runs as 2B, adapted first, then base.

The weights are read once; the adapter is gated per row (``qadapter.lora``), and the two hidden
states meet in one product with the head (design §2, fact 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from qadapter.errors import QAdapterError


class TwoStreamCache(Cache):
    """Keys and values of both streams: row i of a batch of B has its adapted stream in row i and
    its base stream in row B + i of every layer.

    Args:
        cache: a new ``DynamicCache``, ``StaticCache``, … whose layers are taken over.
    """

    def __init__(self, cache: Cache):
        if not cache.layers:
            raise QAdapterError("the cache has no layers yet: make it with config=model.config")
        super().__init__(
            layers=cache.layers, offloading=cache.offloading,
            offload_only_non_sliding=getattr(cache, "only_non_sliding", True),
        )
        self.rows = 0
        """B, once something is in."""

    @property
    def batch_size(self) -> int:
        rows = super().batch_size
        return rows // 2 if rows > 0 else rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(self._both(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self._both(indices))
        self.rows = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rows *= repeats

    def _both(self, indices: Tensor) -> Tensor:
        return torch.cat([indices, indices + self.rows])


def doubled(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """A forward's keyword arguments for 2B rows: tensors with B rows, also in dicts, twice over."""
    return {name: _doubled(value, rows) for name, value in inputs.items()}


def _doubled(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
        return torch.cat([value, value])
    if isinstance(value, dict):
        return doubled(value, rows)
    return value
