"""Keys and values of several streams in one cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from qadapter.errors import QAdapterError
from qadapter.trunk.caches import CachePart


class StreamCache(Cache):
    """Keys and values of S streams: row i of a batch of B has its s-th stream in row s·B + i of
    every layer; layers that hold what all streams have in common have B rows.

    Args:
        cache: a new ``DynamicCache``, ``StaticCache``, … whose layers are taken over.
        streams: S.
    """

    def __init__(self, cache: Cache, streams: int = 2):
        if not cache.layers:
            raise QAdapterError("the cache has no layers yet: make it with config=model.config")
        super().__init__(
            layers=cache.layers, offloading=cache.offloading,
            offload_only_non_sliding=getattr(cache, "only_non_sliding", True),
        )
        self.streams = streams
        self.rows = 0
        """B, once something is in."""
        self.shared: int | None = None
        """How many layers, from the lowest on, hold what the streams have in common; once something
        is in."""
        self.below: Cache | None = None
        self.above: Cache | None = None
        """Those layers, and the others, where there are any; as parts of a trunk see them."""

    def share(self, layers: int) -> None:
        """Let the lowest layers hold one stream for all; said before anything is in.

        Raises:
            QAdapterError: another number of them is shared.
        """
        if layers == self.shared:
            return
        if self.shared is not None:
            raise QAdapterError(
                f"the cache was filled with {self.shared} layers common to its streams, and this "
                f"forward has {layers}: make a new one"
            )
        self.shared = layers
        if layers == 0:
            return
        self.below, self.above = (
            CachePart(self, 0, layers), CachePart(self, layers, len(self.layers)),
        )
        for layer in self.layers[:layers]:
            if isinstance(layer, CacheLayerMixin):
                layer.is_initialized = False  # a static layer may have rows for all streams

    @property
    def batch_size(self) -> int:
        rows = super().batch_size if self.above is None else self.above.batch_size
        return rows // self.streams if rows > 0 else rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer, indices in self._each(beam_idx):
            layer.reorder_cache(indices)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer, rows in self._each(indices):
            layer.batch_select_indices(rows)
        self.rows = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rows *= repeats

    def _each(self, indices: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Every layer, and which of its rows a batch's are."""
        every = torch.cat([indices + stream * self.rows for stream in range(self.streams)])
        for number, layer in enumerate(self.layers):
            yield layer, indices if number < (self.shared or 0) else every


def repeated(inputs: dict[str, Any], rows: int, times: int) -> dict[str, Any]:
    """A forward's keyword arguments for more rows: tensors with B rows, also in dicts, as often."""
    return {name: _repeated(value, rows, times) for name, value in inputs.items()}


def _repeated(value: Any, rows: int, times: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
        return torch.cat([value] * times)
    if isinstance(value, dict):
        return repeated(value, rows, times)
    return value
