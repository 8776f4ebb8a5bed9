"""Sampling a token a row: temperature, top-k, top-p, min-p and the draw in one kernel, no sort.

Every filter of Hugging Face's chain (temperature, top-k, top-p, min-p, in this order) keeps the
columns above some value, and a column's fate depends only on what stands strictly above it:

    top-k   how many columns stand above it     < k
    top-p   how much mass stands above it       < p · (mass top-k has kept)
    min-p   its probability                     >= min_p · the largest one

so two searches for a threshold replace the sort. The search runs over the logits' bits, read as
integers that order like the numbers, and is exact. Ties at a threshold are all kept. Hugging Face's
top-k does the same; its top-p cuts through a group of equal logits wherever its sort put them.
The draw is Gumbel-max: argmax of logit/T + Gumbel noise is a sample of the softmax.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import LOG2E, finite, log1p, tile_columns


@triton.jit
def _ordered(x):
    """An int32 that orders like x: the bits of a negative number count backwards, so flip them.
    16-bit types give 16-bit integers, and half as many steps to search. −0 counts as 0, and NaN
    as −inf."""
    wide = x.to(tl.float32)
    wide = tl.where(wide == 0, 0.0, tl.where(wide != wide, float("-inf"), wide))
    if x.dtype == tl.float32:
        bits = wide.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = wide.to(x.dtype).to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 31) & 0x7FFF)
    return key


@triton.jit
def _weights(x, key, peak, per_temperature, BY_MASS: tl.constexpr):
    if BY_MASS:
        weight = tl.exp2((x.to(tl.float32) - peak) * (per_temperature * LOG2E))
    else:
        weight = tl.full(key.shape, 1.0, tl.float32)  # a count, exact in float32 up to 2²⁴
    return weight


@triton.jit
def _threshold(
    row_ptr, num_columns, low, high, limit, peak, per_temperature,
    BY_MASS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):
    """The smallest key in (low, high] with less than ``limit`` strictly above it.

    ``low`` must have ``limit`` or more above it, ``high`` less. Each pass over the row tries three
    keys and leaves a quarter of the interval: with every pass bound by arithmetic, two bits a pass
    cost less than one bit twice. It ends early once one column is left in the interval.
    """
    tile = tile_columns(LANES, VEC, ALIGNED)
    columns_low, columns_high = num_columns.to(tl.int32), tl.zeros((), tl.int32)
    while (high - low > 1) & (columns_low - columns_high > 1):
        span = high - low
        try_1 = low + tl.maximum(span // 4, 1)
        try_2 = low + span // 2
        try_3 = high - span // 4
        above_1, above_2 = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
        above_3 = tl.zeros((LANES,), tl.float32)
        count_1, count_2 = tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.int32)
        count_3 = tl.zeros((LANES,), tl.int32)
        for start in range(0, num_columns, LANES * VEC):
            columns = start + tile
            x = tl.load(row_ptr + columns, mask=columns < num_columns, other=float("-inf"))
            inside = columns < num_columns
            key = _ordered(x)
            weight = _weights(x, key, peak, per_temperature, BY_MASS)
            is_1, is_2 = inside & (key > try_1), inside & (key > try_2)
            is_3 = inside & (key > try_3)
            above_1 += tl.sum(tl.where(is_1, weight, 0.0), axis=1)
            above_2 += tl.sum(tl.where(is_2, weight, 0.0), axis=1)
            above_3 += tl.sum(tl.where(is_3, weight, 0.0), axis=1)
            count_1 += tl.sum(is_1.to(tl.int32), axis=1)
            count_2 += tl.sum(is_2.to(tl.int32), axis=1)
            count_3 += tl.sum(is_3.to(tl.int32), axis=1)
        below_1 = tl.sum(above_1, axis=0) < limit
        below_2 = tl.sum(above_2, axis=0) < limit
        below_3 = tl.sum(above_3, axis=0) < limit
        number_1, number_2 = tl.sum(count_1, axis=0), tl.sum(count_2, axis=0)
        number_3 = tl.sum(count_3, axis=0)
        # The new interval lies between the last try that is not below and the first that is.
        if below_1:
            high, columns_high = try_1, number_1
        elif below_2:
            low, columns_low = try_1, number_1
            high, columns_high = try_2, number_2
        elif below_3:
            low, columns_low = try_2, number_2
            high, columns_high = try_3, number_3
        else:
            low, columns_low = try_3, number_3
    return low + 1


@triton.jit
def _exponential(column, row, seed_low, seed_high, offset_low, offset_high):
    """An Exp(1) number keyed by (seed, offset, row, column): the same in any launch geometry."""
    bits, _, _, _ = tl.philox_impl(
        column.to(tl.uint32), row.to(tl.uint32), offset_low.to(tl.uint32),
        offset_high.to(tl.uint32), seed_low.to(tl.uint32), seed_high.to(tl.uint32),
    )
    # −log(1 − u) and not −log(u): what wins is a small number, and floats are dense near u = 0,
    # where near 1 they stop at 2⁻²⁴, too coarse for the tail of 128k columns.
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return -log1p(-tl.minimum(uniform, 0.99999994))


@triton.jit(do_not_specialize=["top_k", "seed_low", "seed_high", "offset_low", "offset_high"])
def _sample_kernel(
    logits_ptr, tokens_ptr, stride, num_columns, per_temperature, top_k, top_p, top_p_depth,
    log_min_p, seed_low, seed_high, offset_low, offset_high,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    tile = tile_columns(LANES, VEC, ALIGNED)

    # Lanes are reduced after the loop: a reduction in it whose result is used twice, here by a
    # maximum and a minimum, crashes the compiler of Triton 3.4 to 3.6.
    peaks = tl.full((LANES, VEC), float("-inf"), tl.float32)
    for start in range(0, num_columns, LANES * VEC):
        columns = start + tile
        x = tl.load(row_ptr + columns, mask=columns < num_columns, other=float("-inf"))
        peaks = tl.maximum(peaks, x.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    holds_nan = tl.max(tl.max((peaks != peaks).to(tl.int32), axis=1), axis=0) > 0
    lane_peak = tl.max(peaks, axis=1)
    peak = tl.max(lane_peak, axis=0)
    reference = finite(peak)
    dtype = logits_ptr.dtype.element_ty
    highest = _ordered(peak.to(dtype)).to(tl.int64)
    lowest = _ordered(tl.full((), float("-inf"), tl.float32).to(dtype)).to(tl.int64)

    floor = lowest
    if TOP_K:
        # Every lane holds a column at or above the least of the lanes' peaks: at least LANES of
        # them, so for k <= LANES the k-th largest can't be lower.
        least = _ordered(tl.min(lane_peak, axis=0).to(dtype)).to(tl.int64)
        low = tl.where(top_k <= LANES, least, lowest) - 1
        floor = _threshold(
            row_ptr, num_columns, low, highest, top_k.to(tl.float32), reference, per_temperature,
            False, LANES, VEC, ALIGNED,
        )
    if TOP_P:
        kept = tl.zeros((LANES,), tl.float32)
        for start in range(0, num_columns, LANES * VEC):
            columns = start + tile
            x = tl.load(row_ptr + columns, mask=columns < num_columns, other=float("-inf"))
            key = _ordered(x)
            weight = _weights(x, key, reference, per_temperature, True)
            kept += tl.sum(tl.where(key >= floor, weight, 0.0), axis=1)
        # All columns that deep together hold less than (1 − p)/e: none of them survives.
        deep = _ordered((reference - top_p_depth).to(dtype)).to(tl.int64)
        floor = _threshold(
            row_ptr, num_columns, tl.maximum(floor, deep) - 1, highest,
            top_p * tl.sum(kept, axis=0), reference, per_temperature, True, LANES, VEC, ALIGNED,
        )

    best = tl.full((LANES,), float("-inf"), tl.float32)
    best_column = tl.full((LANES,), -1, tl.int32)
    for start in range(0, num_columns, LANES * VEC):
        columns = start + tile
        x = tl.load(row_ptr + columns, mask=columns < num_columns, other=float("-inf"))
        key = _ordered(x)
        scaled = (x.to(tl.float32) - reference) * per_temperature
        alive = (key >= floor) & (key > lowest)
        if MIN_P:
            alive = alive & (scaled >= log_min_p)
        # Random numbers are most of the work, and after the filters few tiles hold a survivor.
        if tl.max(tl.max(alive.to(tl.int32), axis=1), axis=0) > 0:
            noise = _exponential(columns, row, seed_low, seed_high, offset_low, offset_high)
            score = tl.where(alive, scaled - tl.log(noise), float("-inf"))
            tile_best = tl.max(score, axis=1)
            is_best = score == tile_best[:, None]
            column = tl.min(tl.where(is_best, columns, 0x7FFFFFFF), axis=1)
            better = tile_best > best
            best = tl.where(better, tile_best, best)
            best_column = tl.where(better, column, best_column)
    winner = tl.where(best == tl.max(best, axis=0), best_column, 0x7FFFFFFF)
    token = tl.where(holds_nan, -1, tl.min(winner, axis=0))
    tl.store(tokens_ptr + row, token.to(tl.int64))


def sample(
    logits_NV: Tensor, temperature: float, top_k: int, top_p: float, min_p: float,
    uniform_seed: int, offset: int,
) -> Tensor:
    """Draw a token a row from softmax(logits / temperature) after the filters; int64 [N].

    Args:
        logits_NV: [N, V] float32, bfloat16 or float16: logits or log-probabilities.
        temperature: > 0.
        top_k: 0 keeps all. top_p: in (0, 1], 1 keeps all. min_p: in [0, 1], 0 keeps all.
        uniform_seed, offset: name the random numbers, with the row and the column. Equal names,
            equal draws, whatever the batch or the device; use a new offset for every step.

    Returns:
        Token ids; -1 for a row in which nothing can be drawn: −inf everywhere, or NaN anywhere.

    Raises:
        ValueError: a filter out of its range.
    """
    launch.check_rows("logits", logits_NV)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature} (greedy is an argmax)")
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(f"want top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1; "
                         f"got {top_k}, {top_p}, {min_p}")
    num_rows, num_columns = logits_NV.shape
    tokens_N = torch.empty(num_rows, dtype=torch.int64, device=logits_NV.device)
    if num_rows:
        tile = launch.TILES["sample"]
        use_top_k, use_top_p = 0 < top_k < num_columns, top_p < 1 < num_columns
        depth = temperature * (math.log(num_columns / (1 - top_p)) + 1) if use_top_p else 0.0
        launch.launch(
            _sample_kernel, (num_rows,), logits_NV, tokens_N, logits_NV.stride(0), num_columns,
            1 / temperature, top_k, float(top_p), depth, math.log(min_p) if min_p else 0.0,
            *_words(uniform_seed), *_words(offset),
            TOP_K=use_top_k, TOP_P=use_top_p, MIN_P=min_p > 0,
            **launch.lanes(tile, logits_NV), warps=tile.warps,
        )
    return tokens_N


def _words(number: int) -> tuple[int, int]:
    """64 bits as two int32: a Python int's type at launch, 32 or 64 bits, follows its value."""
    low, high = number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF
    return _signed(low), _signed(high)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
