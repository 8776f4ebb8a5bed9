"""Which data type a base computes in where nobody said: on a CPU, what that CPU multiplies fastest.

CPUs differ more than any guess: two cores with bfloat16 instructions multiply it at twice float32's
rate, two cores without them at a fifth of it. So a product of the model's own width is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from qadapter.system.room import available_memory, size

_ROWS = 128
_FLOPS = 1e8
"""Of the product that is timed: some milliseconds, in whatever type."""
_REPEATS = 5
_CLEARLY = 1.2
"""A type has to be this much faster than the checkpoint's own to be taken in its place: nearly
equal ones must not trade places from one run to the next."""
_MOST_MEMORY = 0.8
"""Share of the memory left that weights may take."""


class DtypeChoice(NamedTuple):
    """What a base is loaded in, and why."""

    dtype: torch.dtype
    reason: str


def on_cpu(device_map: Any = None) -> bool:
    """Whether a base that is loaded with this ``device_map`` will compute on the CPU."""
    if device_map is None:
        return not torch.accelerator.is_available()
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if any(place in ("auto", "balanced", "balanced_low_0", "sequential") for place in places):
        return not torch.accelerator.is_available()
    return all(str(place).partition(":")[0] == "cpu" for place in places)


def choose_dtype(
    config: PretrainedConfig, num_parameters: Callable[[], int] = lambda: 0
) -> DtypeChoice:
    """The data type for a checkpoint on this CPU.

    Weights stored in float32 stay in it: they are not rounded unless somebody asks. Weights of 16
    bits are computed in bfloat16 or float32, whichever this CPU multiplies faster (float16 is slow
    on every CPU), but for float32 that memory has no room for.

    Args:
        num_parameters: asked for where weights would take more room than they are stored in.
    """
    text = config.get_text_config()
    stored = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    choice = choose_for(stored, text.hidden_size)
    if choice.dtype.itemsize > stored.itemsize:
        needed, left = choice.dtype.itemsize * num_parameters(), available_memory()
        if needed > _MOST_MEMORY * left:
            return DtypeChoice(
                torch.bfloat16, f"{choice.reason}, but float32 takes {size(needed)} of memory and "
                f"{size(left)} are left"
            )
    return choice


def choose_for(stored: torch.dtype, width: int) -> DtypeChoice:
    """The same for weights of a type and a model of a width."""
    rates = rates_of_width(width)
    fast = max(rates, key=lambda dtype: rates[dtype])
    if stored not in (torch.float16, torch.bfloat16):
        hint = ""
        if fast == torch.bfloat16 and rates[fast] > _CLEARLY * rates[torch.float32]:
            hint = f"; --dtype bfloat16 would round them and multiply {_times(rates, fast)} as fast"
        return DtypeChoice(stored, f"as its weights are stored{hint}")
    if stored in rates and rates[fast] <= _CLEARLY * rates[stored]:
        return DtypeChoice(stored, f"as its weights are stored; {_told(rates)}")
    return DtypeChoice(fast, f"{_told(rates)}, by a product of this model's width")


@functools.cache
def rates_of_width(width: int) -> dict[torch.dtype, float]:
    """FLOP/s of [rows, width] · [width, columns] in float32 and bfloat16 on one core of this CPU,
    measured once a process."""
    columns = min(8 * width, max(64, int(_FLOPS / (2 * _ROWS * width)) // 64 * 64))
    threads = torch.get_num_threads()
    # One thread and its own time: a busy machine slows the product down, but not this number.
    torch.set_num_threads(1)
    try:
        return {
            dtype: 2 * _ROWS * width * columns / _seconds(width, columns, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _seconds(width: int, columns: int, dtype: torch.dtype) -> float:
    """Processor time of the fastest of a few products."""
    x, weight = torch.ones(_ROWS, width, dtype=dtype), torch.ones(columns, width, dtype=dtype)
    F.linear(x, weight)  # the first one also chooses and compiles its kernel
    seconds = []
    for _ in range(_REPEATS):
        start = time.thread_time()
        F.linear(x, weight)
        seconds.append(time.thread_time() - start)
    return max(min(seconds), 1e-9)


def _times(rates: dict[torch.dtype, float], dtype: torch.dtype) -> str:
    (other,) = (d for d in rates if d != dtype)
    return f"{rates[dtype] / rates[other]:.1f} times"


def _told(rates: dict[torch.dtype, float]) -> str:
    (fast, rate), (slow, slower) = sorted(rates.items(), key=lambda x: -x[1])
    return (
        f"this CPU multiplies {dtype_name(fast)} at {rate / 1e9:.0f} and {dtype_name(slow)} at "
        f"{slower / 1e9:.0f} GFLOP/s a core"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As options and results spell it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(model: PreTrainedModel) -> str:
    """What a model's head, and so its base, computes in; for results."""
    return dtype_name(model.get_output_embeddings().weight.dtype)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What products on a kind of device are computed in under the autocast that is on, or None."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    on = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None
