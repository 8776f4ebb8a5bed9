"""A faster draw: on a GPU one kernel does temperature, top-k, top-p, min-p and the draw without
sorting; on a CPU one uniform number a row is looked up in the cumulated probabilities.

``model.generate(..., do_sample=True, custom_generate=fused_sample)`` draws from the distribution
that ``generate`` alone draws from, with random numbers of its own. transformers' loop stays what it
is: the drawn token reaches it as the only possible one, and its argmax takes that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation import (
    GenerationMode,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qadapter.errors import QAdapterError
from qadapter_kernels import triton

_FILTERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""What the kernel does itself, in the order it does it, which is transformers'."""


def unavailable_reason(device_type: str, config: GenerationConfig) -> str | None:
    """None where the draw can be faster than transformers', else one sentence that says why not."""
    if config.return_dict_in_generate and config.output_scores:
        return "output_scores asks for the filtered scores, which a fused draw never writes"
    return None if device_type == "cpu" else triton.unavailable_reason(device_type)


def fused_sample(
    model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList,
    stopping_criteria: Any, generation_config: GenerationConfig, **kwargs: Any,
) -> Any:
    """What ``generate(custom_generate=fused_sample)`` calls for its decoding loop; of any model.

    On a GPU, logits processors that are none of the four filters, or stand before another one, run
    as they are; what follows them is done by the kernel, where ties at top-p's threshold are all
    kept (transformers cuts through them as its sort left them). On a CPU all processors run as they
    are. Where neither serves (``unavailable_reason``: a GPU without Triton, or ``output_scores``),
    and where nothing is drawn (``do_sample=False``), this is transformers' own loop. Draws follow
    ``torch.manual_seed``.

    Raises:
        QAdapterError: another way of generating than one draw a row and step (beams, assistants).
    """
    mode = generation_config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise QAdapterError(f"fused_sample draws one token a row and step, not by {mode.value}")
    drawn = mode == GenerationMode.SAMPLE
    if drawn and unavailable_reason(model.device.type, generation_config) is None:
        logits_processor = LogitsProcessorList(_drawing(model, logits_processor))
        generation_config = copy.copy(generation_config)
        generation_config.do_sample = False
    return model._sample(
        input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        generation_config=generation_config, **kwargs,
    )


def _drawing(
    model: PreTrainedModel, processors: LogitsProcessorList
) -> list[LogitsProcessor]:
    """The processors with the draw behind them, or in place of those that the kernel does."""
    if not _in_kernel(model.device.type):
        return [*processors, _Draw()]
    others, filters = _split(processors)
    # Scores that nobody touched hold the model's own 16 bits, which take half the search.
    dtype = torch.float32 if others else model.get_output_embeddings().weight.dtype
    return [*others, _KernelDraw(filters, dtype)]


def _in_kernel(device_type: str) -> bool:
    return device_type != "cpu"


def draw_by_lookup(scores: Tensor, uniform_B: Tensor | None = None) -> Tensor:
    """One token a row: the first at which the cumulated probability passes a uniform number.

    multinomial draws an exponential number for each of the V tokens, on one thread: a fifth of a
    step of SmolLM2 for 64 rows on a CPU.

    Args:
        scores: [B, V], logits after all filters; −inf for what can't be drawn.
        uniform_B: float64 [B], in [0, 1); default: drawn here.

    Returns:
        int64 [B].

    Raises:
        QAdapterError: a row without any token to draw, or with NaN.
    """
    # As float64, sums of 2¹⁷ float32 probabilities keep every one of them.
    cumulated_BV = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
    total_B1 = cumulated_BV[:, -1:]
    if not total_B1.isfinite().all():
        raise QAdapterError("nothing can be drawn: every token of a row is −inf, or one is NaN")
    # Below the total, which a product may be rounded up to: a token past it has probability 0.
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    uniform_B1 = torch.rand_like(total_B1) if uniform_B is None else uniform_B[:, None]
    drawn_B1 = torch.minimum(uniform_B1 * total_B1, below_B1)
    return torch.searchsorted(cumulated_BV, drawn_B1, right=True)[:, 0]


class _Draw(LogitsProcessor):
    """Scores [B, V] in which one drawn token a row is 0 and the others are −inf."""

    def draw(self, scores: Tensor) -> Tensor:
        """[B]."""
        return draw_by_lookup(scores)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # In the kernel, a row in which nothing can be drawn has token −1, on which scatter fails,
        # as multinomial would.
        tokens = self.draw(scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _KernelDraw(_Draw):
    """The same with the filters, in one kernel."""

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

    def draw(self, scores: Tensor) -> Tensor:
        tokens = triton.sample(scores.to(self.dtype), *self.options, self.seed, self.step)
        self.step += 1
        return tokens


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
