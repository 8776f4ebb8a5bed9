"""Sampling in one kernel: temperature, top-k, top-p, min-p and the draw, without sorting.

``model.generate(..., do_sample=True, custom_generate=fused_sample)`` draws from the distribution
that ``generate`` alone draws from, with random numbers of its own. transformers' loop stays what it
is: the drawn token reaches it as the only possible one, and its argmax takes that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    GenerationMode,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qadapter.errors import QAdapterError
from qadapter_kernels import triton

if TYPE_CHECKING:
    from qadapter.model import QAdapterModel

_FILTERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""What the kernel does itself, in the order it does it, which is transformers'."""


def unavailable_reason(device_type: str, config: GenerationConfig) -> str | None:
    """None where the draw can be fused, else one sentence that says why not."""
    if config.return_dict_in_generate and config.output_scores:
        return "output_scores asks for the filtered scores, which the kernel never writes"
    return triton.unavailable_reason(device_type)


def fused_sample(
    model: QAdapterModel, input_ids: Tensor, logits_processor: LogitsProcessorList,
    stopping_criteria: Any, generation_config: GenerationConfig, **kwargs: Any,
) -> Any:
    """What ``generate(custom_generate=fused_sample)`` calls for its decoding loop.

    Logits processors that are none of the four filters, or stand before another one, run as they
    are; what follows them is done by the kernel. Where the kernel can't serve
    (``unavailable_reason``: no GPU with Triton, or ``output_scores``), and where nothing is drawn
    (``do_sample=False``), this is transformers' own loop. Ties at top-p's threshold are all kept,
    where transformers cuts through them as its sort left them. Draws follow ``torch.manual_seed``.

    Raises:
        QAdapterError: another way of generating than one draw a row and step (beams, assistants).
    """
    mode = generation_config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise QAdapterError(f"fused_sample draws one token a row and step, not by {mode.value}")
    drawn = mode == GenerationMode.SAMPLE
    if drawn and unavailable_reason(model.device.type, generation_config) is None:
        others, filters = _split(logits_processor)
        # Scores that nobody touched hold the model's own 16 bits, which take half the search.
        dtype = torch.float32 if others else model.head.weight.dtype
        logits_processor = LogitsProcessorList([*others, _FusedDraw(filters, dtype)])
        generation_config = copy.copy(generation_config)
        generation_config.do_sample = False
    return model._sample(
        input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        generation_config=generation_config, **kwargs,
    )


class _FusedDraw(LogitsProcessor):
    """Scores [B, V] in which one drawn token a row is 0 and the others are −inf."""

    def __init__(self, filters: Sequence[LogitsProcessor], dtype: torch.dtype):
        by_type = {type(one): one for one in filters}
        temperature = by_type.get(TemperatureLogitsWarper)
        top_k, top_p = by_type.get(TopKLogitsWarper), by_type.get(TopPLogitsWarper)
        min_p = by_type.get(MinPLogitsWarper)
        self.options = (
            temperature.temperature if temperature else 1.0, top_k.top_k if top_k else 0,
            top_p.top_p if top_p else 1.0, min_p.min_p if min_p else 0.0,
        )
        self.dtype = dtype
        self.seed = int(torch.randint(2**62, ()))
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = triton.sample(scores.to(self.dtype), *self.options, self.seed, self.step)
        self.step += 1
        # A row in which nothing can be drawn has token −1, on which scatter fails, as multinomial
        # would.
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _split(
    processors: LogitsProcessorList,
) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
    """(what has to run as it is, the filters at the end that the kernel does)."""
    number, end = len(_FILTERS), len(processors)
    while end and type(processors[end - 1]) in _FILTERS[:number]:
        last = processors[end - 1]
        # top_p = 0 keeps the likeliest token; the kernel wants a positive mass.
        least = getattr(last, "min_tokens_to_keep", 1), getattr(last, "filter_value", -torch.inf)
        if least != (1, -torch.inf) or (type(last) is TopPLogitsWarper and last.top_p <= 0):
            break
        number, end = _FILTERS.index(type(last)), end - 1
    return list(processors[:end]), list(processors[end:])
