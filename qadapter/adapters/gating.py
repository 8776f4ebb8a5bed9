"""Adapted and frozen rows in one forward: every PEFT layer gives each group of a batch's rows, or
each token of a packed row, the adapter of its stream, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qadapter.adapters.streams import BASE
from qadapter.errors import QAdapterError


class RowsOfStreams:
    """What all gates of one model look at: which rows of a batch, or which tokens of a packed row,
    belong to which stream, while several run in it."""

    def __init__(self) -> None:
        self.clear()

    def set(self, streams: Sequence[int], rows: int, tokens: int) -> None:
        self.streams: Sequence[int] = streams
        self.rows, self.tokens = rows, tokens
        self.own_T1: dict[int, Tensor] = {}

    def set_tokens(self, streams: Sequence[int], stream_T: Tensor) -> None:
        """Each token of one packed row [1, T] has one of the streams of its own."""
        self.set(streams, 1, len(stream_T))
        self.own_T1 = {stream: (stream_T == stream)[:, None] for stream in streams}

    def clear(self) -> None:
        self.set((), 0, 0)

    def alone(self, x: Tensor, stream: int) -> Tensor:
        """x with zeros for all other streams. It is not multiplied by a mask: 0·inf in another
        stream's row would not be 0."""
        if self.own_T1:
            self._require_order(x)
            return torch.where(self.own_T1[stream], x, 0)
        own = self._rows_of(x, stream)
        return nn.functional.pad(
            x[own], [0, 0] * (x.dim() - 1) + [own.start, x.shape[0] - own.stop]
        )

    def together(self, outputs: Sequence[Tensor]) -> Tensor:
        """Of one output for each stream, every stream's own rows or tokens."""
        if self.own_T1:
            found, *others = outputs
            self._require_order(found)
            for stream, x in zip(self.streams[1:], others, strict=True):
                found = torch.where(self.own_T1[stream], x, found)
            return found
        streams = zip(outputs, self.streams, strict=True)
        return torch.cat([x[self._rows_of(x, stream)] for x, stream in streams])

    def _rows_of(self, x: Tensor, stream: int) -> slice:
        """A stream's rows in a tensor [rows, ...] or [rows·tokens, D]."""
        rows = self._require_order(x)
        size = rows // len(self.streams)
        place = self.streams.index(stream)
        return slice(place * size, (place + 1) * size)

    def _require_order(self, x: Tensor) -> int:
        expected = self.rows if x.dim() > 2 else self.rows * self.tokens
        if x.shape[0] != expected:
            raise QAdapterError(
                "the adapter sits in layers that see tokens out of order (routed experts?): its "
                "two streams can't share a forward; decode it at strength 0, or 1 with its α's"
            )
        return expected


class GatedDropout(nn.Module):
    def __init__(self, dropout: nn.Module, rows: RowsOfStreams, stream: int):
        super().__init__()
        self.dropout = dropout
        self.rows = rows
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        if not self.rows.streams:
            return x
        return self.rows.alone(x, self.stream)


class PutStreams:
    """Forward hook of layers whose adapter is no sum that an input of zeros switches off: the layer
    runs once more for every other stream, and each gives its own rows."""

    def __init__(self, rows: RowsOfStreams, names: list[str]):
        self.rows = rows
        self.names = names

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any):
        if not self.rows.streams:
            return None
        outputs, active = [], layer.active_adapters
        for stream in self.rows.streams:
            if stream == BASE:
                outputs.append(frozen_module(layer)(*args, **kwargs))
            elif self.names[stream] in active:
                outputs.append(output)
            else:
                layer._active_adapter = [self.names[stream]]
                outputs.append(layer.forward(*args, **kwargs))
                layer._active_adapter = active
        if isinstance(output, tuple):
            return tuple(map(self.rows.together, zip(*outputs, strict=True)))
        return self.rows.together(outputs)


def sums_adapters(layer: nn.Module) -> bool:
    """Whether a layer's output is the base's plus, for each adapter, a product with its input."""
    plain = isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
    return (
        plain and isinstance(layer.get_base_layer(), (nn.Linear, Conv1D))
        and not layer.lora_variant
    )


def frozen_module(layer: nn.Module) -> nn.Module:
    """The base's module that an adapted layer wraps."""
    wrapper = isinstance(layer, AuxiliaryTrainingWrapper)
    return layer.original_module if wrapper else layer.base_layer
