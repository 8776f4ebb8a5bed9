"""Device functions the kernels share: online log-sum-exp and the statistics that ride on it.

Legend: L lanes, K columns of one lane; a tile of a row is [L, K].

Every lane keeps a running (peak, total) of its own columns, total = Σ exp(x − peak). The K columns
of a lane are in one thread, one 16-byte load where rows are aligned, so a fold is arithmetic inside
a thread: one rescale for K columns, no shuffle and no barrier in the loop, and warps are free to
run ahead of each other while others wait for memory. Lanes meet once, at the end of the row, in a
fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NO_ACTION = tl.constexpr(-1)
MASKED_ROW = tl.constexpr(-2)
SMALLEST_DECAY = tl.constexpr(1e-37)


@triton.jit
def tile_columns(LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns of a tile, int32 [L, K]. A lane's K columns are adjacent where one 16-byte load can
    take them. Where rows start anywhere, loads are single elements, and neighbouring lanes take
    neighbouring columns: coalesced again, and a lane still folds K columns by itself."""
    if ALIGNED:
        columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    else:
        columns = tl.arange(0, LANES)[:, None] + tl.arange(0, VEC)[None, :] * LANES
    return columns


@triton.jit
def finite(peak):
    """A finite number to subtract: −inf − (−inf) is NaN, so an infinite peak counts as 0."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def exp_above(x, reference):
    """exp(x − reference). The subtraction comes first: it is exact near the peak, so a row with a
    large common offset loses no digits. x·log₂e − reference·log₂e as one fused multiply-add
    would save one of a dozen instructions a column, in kernels that wait for memory."""
    return tl.exp2((x - reference) * LOG2E)


@triton.jit
def log1p(x):
    """log(1 + x) for x > −1, exact where 1 + x rounds: the rounded sum's own error cancels."""
    total = 1.0 + x
    rounded = total == 1.0
    return tl.where(rounded, x, tl.log(total) * (x / tl.where(rounded, 1.0, total - 1.0)))


@triton.jit
def weighted_sum(weight_a, a, weight_b, b, USE_A: tl.constexpr, USE_B: tl.constexpr):
    """weight_a·a + weight_b·b; −inf where a stream in use is −inf, whatever the signs, and NaN
    where one is NaN. A stream of weight 0 is not in use and never touched: 0·inf is NaN."""
    if USE_A and USE_B:
        lowest = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
        total = tl.where(lowest == float("-inf"), lowest, weight_a * a + weight_b * b)
    elif USE_A:
        total = tl.where(a == float("-inf"), float("-inf"), weight_a * a)
    elif USE_B:
        total = tl.where(b == float("-inf"), float("-inf"), weight_b * b)
    else:
        total = tl.zeros_like(a)
    return total


@triton.jit
def fold_logsumexp(peak, total, x):
    """Take a tile x [L, K] into the running (peak, total) [L]. Columns of −inf weigh nothing."""
    peak_new = tl.maximum(peak, tl.max(x, axis=1))
    reference = finite(peak_new)
    weight = exp_above(x, reference[:, None])
    return peak_new, total * exp_above(peak, reference) + tl.sum(weight, axis=1)


@triton.jit
def merge_logsumexp(peak, total):
    """The lanes of a row, or the programs of a split row, [L] → two scalars."""
    peak_row = tl.max(peak, axis=0)
    return peak_row, tl.sum(total * exp_above(peak, finite(peak_row)), axis=0)


@triton.jit
def logsumexp_of(peak, total):
    """−inf for a row without support (total 0)."""
    return finite(peak) + tl.log(total)


@triton.jit
def _rescale(moment, decay):
    """A moment can be infinite (support not covered) and must stay so: 0·inf would be NaN. What
    the clamp keeps of a finite moment is below its rounding."""
    return moment * tl.maximum(decay, SMALLEST_DECAY)


@triton.jit
def fold_statistics(peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b, u, b):
    """Take tiles u, b [L, K] into both pairs and into three first moments [L], all of them
    relative to the running peaks ū, b̄, so that a common offset costs no digits:

        own_u = Σ e^(u−ū)·(u−ū)    cross_u = Σ e^(u−ū)·(b−b̄)    gap_b = Σ e^(b−b̄)·((b−b̄)−(u−ū))

    When a peak moves by −d, a moment moves by d times the total it is weighed with.
    """
    peak_u_new = tl.maximum(peak_u, tl.max(u, axis=1))
    peak_b_new = tl.maximum(peak_b, tl.max(b, axis=1))
    reference_u, reference_b = finite(peak_u_new), finite(peak_b_new)
    shift_u, shift_b = finite(peak_u) - reference_u, finite(peak_b) - reference_b
    decay_u, decay_b = exp_above(peak_u, reference_u), exp_above(peak_b, reference_b)

    du, db = u - reference_u[:, None], b - reference_b[:, None]
    p, pi = tl.exp2(du * LOG2E), tl.exp2(db * LOG2E)
    no_u, no_b = u == float("-inf"), b == float("-inf")
    # By support and not by p > 0: a weight that underflows still says that b must cover it.
    own = tl.where(no_u, 0.0, p * du)
    cross = tl.where(no_u, 0.0, tl.where(no_b, float("-inf"), p * db))
    gap = tl.where(no_b, 0.0, tl.where(no_u, float("inf"), pi * (db - du)))

    own_u = _rescale(own_u + shift_u * total_u, decay_u) + tl.sum(own, axis=1)
    cross_u = _rescale(cross_u + shift_b * total_u, decay_u) + tl.sum(cross, axis=1)
    gap_b = _rescale(gap_b + (shift_b - shift_u) * total_b, decay_b) + tl.sum(gap, axis=1)
    total_u = total_u * decay_u + tl.sum(p, axis=1)
    total_b = total_b * decay_b + tl.sum(pi, axis=1)
    return peak_u_new, total_u, peak_b_new, total_b, own_u, cross_u, gap_b


@triton.jit
def merge_statistics(peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b):
    """The lanes of a row, or the programs of a split row, [L] → seven scalars."""
    peak_u_row, peak_b_row = tl.max(peak_u, axis=0), tl.max(peak_b, axis=0)
    shift_u = finite(peak_u) - finite(peak_u_row)
    shift_b = finite(peak_b) - finite(peak_b_row)
    decay_u = exp_above(peak_u, finite(peak_u_row))
    decay_b = exp_above(peak_b, finite(peak_b_row))
    own_u = tl.sum(_rescale(own_u + shift_u * total_u, decay_u), axis=0)
    cross_u = tl.sum(_rescale(cross_u + shift_b * total_u, decay_u), axis=0)
    gap_b = tl.sum(_rescale(gap_b + (shift_b - shift_u) * total_b, decay_b), axis=0)
    total_u, total_b = tl.sum(total_u * decay_u, axis=0), tl.sum(total_b * decay_b, axis=0)
    return peak_u_row, total_u, peak_b_row, total_b, own_u, cross_u, gap_b


@triton.jit
def store_statistics(stats_ptr, row, num_rows, keep, total_u, total_b, own_u, cross_u, gap_b):
    """Entropy of π̃, KL(π̃‖π), KL(π‖π̃) into stats [3, rows]. An expectation under a distribution
    without support is 0."""
    some_u, some_b = total_u != 0, total_b != 0  # and not > 0: a NaN stays one
    per_u, per_b = 1 / tl.where(some_u, total_u, 1.0), 1 / tl.where(some_b, total_b, 1.0)
    log_u = tl.log(tl.where(some_u, total_u, 1.0))
    log_b = tl.log(tl.where(some_b, total_b, 1.0))
    entropy = log_u - own_u * per_u
    # Each divergence is >= 0; where π̃ = π its two halves cancel up to rounding, either side of 0.
    forward = (own_u - cross_u) * per_u - log_u + log_b
    reverse = gap_b * per_b - log_b + log_u
    forward = tl.where(forward < 0, 0.0, forward)  # and not maximum(): a NaN stays a NaN
    reverse = tl.where(reverse < 0, 0.0, reverse)
    tl.store(stats_ptr + row, tl.where(keep & some_u, entropy, 0.0))
    tl.store(stats_ptr + num_rows + row, tl.where(keep & some_u, forward, 0.0))
    tl.store(stats_ptr + 2 * num_rows + row, tl.where(keep & some_b, reverse, 0.0))
