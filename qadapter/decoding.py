"""Decoding two streams in one forward: a batch of B rows runs as 2B, adapted first, then base.

The weights are read once; the adapter is gated per row (``qadapter.lora``), and the two hidden
states meet in one product with the head (design §2, fact 5).
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from qadapter.adapters import HeadAdapter
from qadapter.errors import QAdapterError
from qadapter.head import trunk

_FILLED: weakref.WeakKeyDictionary[Cache, str] = weakref.WeakKeyDictionary()
"""Which streams the caches hold that callers keep between turns."""


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


class StreamedGeneration(GenerationMixin):
    """Generation for models with ``base``, ``adapter`` and ``policy``: the trunk runs the streams
    that the policy needs, and caches hold those."""

    @property
    def adapts_trunk(self) -> bool:
        """Whether the two streams differ inside the trunk (LoRA), not on its output alone."""
        return not isinstance(self.adapter, HeadAdapter)

    def _streams(self, strength: float | Tensor | None) -> str:
        """What the trunk has to run for a policy: "adapter", "base" or "both"."""
        if not self.adapts_trunk:
            return "base"
        weight_a, weight_b = self.policy.stream_weights(strength)
        if isinstance(weight_a, Tensor):
            return "both"
        return "adapter" if weight_b == 0 else "base" if weight_a == 0 else "both"

    def _run(self, streams: str, **inputs: Any) -> BaseModelOutputWithPast:
        """The trunk. For "both", 2B rows: the adapted stream's, then the base's."""
        body = trunk(self.base)
        if streams == "adapter":
            self._check_cache(streams, inputs.get("past_key_values"))
            return body(**inputs)
        if streams == "base":
            off = self.adapter.off() if self.adapts_trunk else contextlib.nullcontext()
            self._check_cache(streams, inputs.get("past_key_values"))
            with torch.no_grad(), off:
                return body(**inputs)
        shaped = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
        rows, tokens = shaped.shape[:2]
        cache, use_cache = inputs.pop("past_key_values"), inputs["use_cache"]
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = TwoStreamCache(DynamicCache(config=self.base.config))
        self._check_cache(streams, cache)
        if cache is not None:
            cache.rows = rows
        with self.adapter.on_first_half(2 * rows, tokens):
            outputs = body(past_key_values=cache, **doubled(inputs, rows))
        for name in ("hidden_states", "attentions"):
            if outputs.get(name) is not None:  # the customised model's: its adapted stream
                outputs[name] = tuple(x[:rows] for x in outputs[name])
        return outputs

    def _check_cache(self, streams: str, cache: Any) -> None:
        if isinstance(cache, Cache) and isinstance(cache, TwoStreamCache) != (streams == "both"):
            raise QAdapterError(
                "this policy runs both streams: pass past_key_values="
                "qadapter.decoding.TwoStreamCache(DynamicCache(config=model.config))"
                if streams == "both" else
                f"this policy runs the {streams} stream alone: a TwoStreamCache can't serve it"
            )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any,
        batch_size: int, max_cache_length: int,
    ) -> None:
        streams = self._streams(model_kwargs.get("strength"))
        given = model_kwargs.get("past_key_values")
        if given is not None and self.adapts_trunk:
            filled = _FILLED.setdefault(given, streams)
            if filled != streams and given.get_seq_length():
                raise QAdapterError(
                    f"past_key_values hold the {filled} stream, this policy runs {streams}"
                )
            _FILLED[given] = streams
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode,
            2 * batch_size if streams == "both" else batch_size, max_cache_length,
        )
        if streams == "both" and given is None and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"] = TwoStreamCache(model_kwargs["past_key_values"])

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; its paged cache holds one stream."""
        if self._streams(None) == "both":
            raise QAdapterError(
                "continuous batching runs one stream and this policy needs both: use generate, or "
                "strength 0, or 1 in the policy parametrization at the trained alphas"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # The dial is this model's: an assistant proposes tokens in its own way.
        model_kwargs = {k: v for k, v in model_kwargs.items() if k != "strength"}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)
