"""The logits level: soft value and residual Q from [N, V] logits, and its gradient.

Forward reads each logit once and writes a few numbers a row; backward recomputes π̃ from lse(u):
4V and 6V bytes a row in 16-bit types (reading a and b, then also writing ∂a), which is all there
is to move, so both are as fast as memory is.

    u = (c_a·a + (c_b + α₀)·b)/α̃    π̃ = softmax(u)    V = α̃·lse(u) − α₀·lse(b)
    ∂a = c_a·(g·onehot(action) + v·π̃)

Shapes: N rows, V columns; rows are split over S programs where there are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Coefficients
from . import launch
from .device import (
    MASKED_ROW,
    exp_above,
    finite,
    fold_logsumexp,
    fold_statistics,
    merge_logsumexp,
    merge_statistics,
    store_statistics,
    tile_columns,
    weighted_sum,
)


@triton.jit
def _store_row(
    row, num_rows, action, peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b,
    a_row, b_row, base_lse_ptr, out_ptr, stats_ptr, alpha_0, alpha_tilde, adapter_coef, base_coef,
    ALPHA_0: tl.constexpr, ADAPTER_COEF: tl.constexpr, BASE_COEF: tl.constexpr,
):
    """From a row's totals to its six outputs, out [6, N], and its statistics."""
    keep, has_action = action != MASKED_ROW, action >= 0
    column = tl.maximum(action, 0)
    a_action = tl.load(a_row + column, mask=has_action, other=0.0).to(tl.float32)
    b_action = tl.load(b_row + column, mask=has_action, other=0.0).to(tl.float32)
    q_action = weighted_sum(adapter_coef, a_action, base_coef, b_action, ADAPTER_COEF, BASE_COEF)

    # Peak and rest apart: with a common offset of 10⁴, b − lse(b) and lse(u) − lse(b) would lose
    # four digits.
    if base_lse_ptr is None:
        base_peak, base_rest = finite(peak_b), tl.log(total_b)
    else:
        base_peak, base_rest = 0.0, tl.load(base_lse_ptr + row, mask=keep, other=0.0)
    known = base_rest == base_rest  # NaN is not hidden behind a −inf
    base_logprob = (b_action - base_peak) - base_rest
    base_logprob = tl.where((b_action == float("-inf")) & known, float("-inf"), base_logprob)

    value_peak, value = alpha_tilde * finite(peak_u), alpha_tilde * tl.log(total_u)
    if ALPHA_0:
        value_peak -= alpha_0 * base_peak
        value = tl.where((total_u == 0) & known, float("-inf"), value - alpha_0 * base_rest)
    value += value_peak

    # Every row stores: what is left unwritten by an early return is somebody's NaN.
    tl.store(out_ptr + row, tl.where(has_action, q_action, 0.0))
    tl.store(out_ptr + num_rows + row, tl.where(keep, value, 0.0))
    tl.store(out_ptr + 2 * num_rows + row, tl.where(has_action, base_logprob, 0.0))
    tl.store(out_ptr + 3 * num_rows + row, tl.where(keep, base_peak + base_rest, 0.0))
    tl.store(out_ptr + 4 * num_rows + row, tl.where(keep, finite(peak_u), 0.0))
    tl.store(out_ptr + 5 * num_rows + row, tl.where(keep, total_u, 0.0))
    if stats_ptr is not None:
        store_statistics(
            stats_ptr, row, num_rows, keep, total_u, total_b, own_u, cross_u, gap_b
        )


@triton.jit(do_not_specialize=["num_rows", "splits", "tiles_each"])
def _forward_kernel(
    a_ptr, b_ptr, actions_ptr, base_lse_ptr, out_ptr, stats_ptr, partials_ptr,
    a_stride, b_stride, num_columns, num_rows, splits, tiles_each,
    scale_a, scale_b, alpha_0, alpha_tilde, adapter_coef, base_coef,
    POLICY_A: tl.constexpr, POLICY_B: tl.constexpr, FOLD_BASE: tl.constexpr,
    ALPHA_0: tl.constexpr, ADAPTER_COEF: tl.constexpr, BASE_COEF: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):
    """One program a row, or (with ``partials_ptr``) one of ``splits`` programs a row.

    Coefficients arrive as float32 arguments, so that a sweep over α's compiles nothing; only
    whether they are zero is compiled in. POLICY_A/B: the stream is part of u. FOLD_BASE: lse(b)
    is wanted. A stream that no flag asks for is not read.
    """
    TILE: tl.constexpr = LANES * VEC
    STATISTICS: tl.constexpr = stats_ptr is not None
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)  # row·stride passes 2³¹ from 16,744 rows of 128,256
    part = program % splits
    action = tl.load(actions_ptr + row)
    a_row, b_row = a_ptr + row * a_stride, b_ptr + row * b_stride

    begin = part * tiles_each * TILE
    end = tl.minimum(begin + tiles_each * TILE, num_columns)
    end = tl.where(action == MASKED_ROW, begin, end)  # nothing of a masked row is read
    tile = tile_columns(LANES, VEC, ALIGNED)

    peak_u = tl.full((LANES,), float("-inf"), tl.float32)
    peak_b = tl.full((LANES,), float("-inf"), tl.float32)
    total_u, total_b = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    own_u, cross_u = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    gap_b = tl.zeros((LANES,), tl.float32)
    for start in range(begin, end, TILE):
        columns = start + tile
        # Masked in every tile and not only in the last: one predicate a 16-byte load, against
        # a second copy of the body.
        inside = columns < end
        a, b = tl.zeros((LANES, VEC), tl.float32), tl.zeros((LANES, VEC), tl.float32)
        if POLICY_A:
            a = tl.load(a_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if POLICY_B or FOLD_BASE:
            b = tl.load(b_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
        u = weighted_sum(scale_a, a, scale_b, b, POLICY_A, POLICY_B)
        if not (POLICY_A or POLICY_B):
            u = tl.where(inside, u, float("-inf"))
        if STATISTICS:
            peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b = fold_statistics(
                peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b, u, b
            )
        else:
            peak_u, total_u = fold_logsumexp(peak_u, total_u, u)
            if FOLD_BASE:
                peak_b, total_b = fold_logsumexp(peak_b, total_b, b)

    if STATISTICS:
        peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b = merge_statistics(
            peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b
        )
    else:
        peak_u, total_u = merge_logsumexp(peak_u, total_u)
        peak_b, total_b = merge_logsumexp(peak_b, total_b)
        own_u, cross_u, gap_b = 0.0, 0.0, 0.0

    if partials_ptr is None:
        _store_row(
            row, num_rows, action, peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b,
            a_row, b_row, base_lse_ptr, out_ptr, stats_ptr,
            alpha_0, alpha_tilde, adapter_coef, base_coef, ALPHA_0, ADAPTER_COEF, BASE_COEF,
        )
    else:  # partials [7 or 4, N, S]
        field = num_rows * splits
        tl.store(partials_ptr + program, peak_u)
        tl.store(partials_ptr + field + program, total_u)
        tl.store(partials_ptr + 2 * field + program, peak_b)
        tl.store(partials_ptr + 3 * field + program, total_b)
        if STATISTICS:
            tl.store(partials_ptr + 4 * field + program, own_u)
            tl.store(partials_ptr + 5 * field + program, cross_u)
            tl.store(partials_ptr + 6 * field + program, gap_b)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _finish_kernel(
    a_ptr, b_ptr, actions_ptr, base_lse_ptr, out_ptr, stats_ptr, partials_ptr,
    a_stride, b_stride, num_rows, splits, alpha_0, alpha_tilde, adapter_coef, base_coef,
    ALPHA_0: tl.constexpr, ADAPTER_COEF: tl.constexpr, BASE_COEF: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """A split row's programs meet here, in a fixed order; atomics would decide by arrival."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MAX_SPLITS)
    there = part < splits
    field = num_rows * splits
    partials = partials_ptr + row * splits + part
    peak_u = tl.load(partials, mask=there, other=float("-inf"))
    total_u = tl.load(partials + field, mask=there, other=0.0)
    peak_b = tl.load(partials + 2 * field, mask=there, other=float("-inf"))
    total_b = tl.load(partials + 3 * field, mask=there, other=0.0)
    if stats_ptr is not None:
        own_u = tl.load(partials + 4 * field, mask=there, other=0.0)
        cross_u = tl.load(partials + 5 * field, mask=there, other=0.0)
        gap_b = tl.load(partials + 6 * field, mask=there, other=0.0)
        peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b = merge_statistics(
            peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b
        )
    else:
        peak_u, total_u = merge_logsumexp(peak_u, total_u)
        peak_b, total_b = merge_logsumexp(peak_b, total_b)
        own_u, cross_u, gap_b = 0.0, 0.0, 0.0
    _store_row(
        row, num_rows, tl.load(actions_ptr + row),
        peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b,
        a_ptr + row * a_stride, b_ptr + row * b_stride, base_lse_ptr, out_ptr, stats_ptr,
        alpha_0, alpha_tilde, adapter_coef, base_coef, ALPHA_0, ADAPTER_COEF, BASE_COEF,
    )


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def _backward_kernel(
    a_ptr, b_ptr, actions_ptr, normalizer_ptr, grad_q_ptr, grad_v_ptr, out_ptr,
    a_stride, b_stride, out_stride, num_columns, num_rows, tiles, scale_a, scale_b, adapter_coef,
    POLICY_B: tl.constexpr, TILE: tl.constexpr,
):
    """One program a tile of a row, both counted on grid.x.

    ``out_ptr`` may be ``a_ptr``: an element is read and written by one program, once, the
    write depending on the read. So nothing here may read another tile's element of a.
    """
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    columns = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = columns < num_columns
    action = tl.load(actions_ptr + row)
    peak, total = tl.load(normalizer_ptr + row), tl.load(normalizer_ptr + num_rows + row)
    # A masked row and a row without support have gradient 0 and are not read: 0·NaN is NaN.
    alive = (action != MASKED_ROW) & (total != 0)
    read = columns < tl.where(alive, num_columns, 0)
    a = tl.load(a_ptr + row * a_stride + columns, mask=read, other=float("-inf")).to(tl.float32)
    b = tl.zeros_like(a)
    if POLICY_B:
        b = tl.load(b_ptr + row * b_stride + columns, mask=read, other=float("-inf")).to(tl.float32)
    u = weighted_sum(scale_a, a, scale_b, b, True, POLICY_B)
    policy = exp_above(u, peak)

    grad_q = tl.load(grad_q_ptr + row, mask=action >= 0, other=0.0)
    grad_v = tl.load(grad_v_ptr + row, mask=alive, other=0.0) / tl.where(alive, total, 1.0)
    # In float32, before rounding: where π̃ is sure of the action the two nearly cancel.
    grad = grad_v * policy + tl.where(columns == action, grad_q, 0.0)
    grad = tl.where(u == float("-inf"), 0.0, adapter_coef * grad)
    tl.store(
        out_ptr + row * out_stride + columns, grad.to(out_ptr.dtype.element_ty), mask=inside
    )


def logits_forward(
    a_NV: Tensor, b_NV: Tensor, actions_N: Tensor, coef: Coefficients,
    base_lse_N: Tensor | None, statistics: bool,
) -> tuple[Tensor, ...]:
    """→ q_action, value, base_logprob, lse(b), each float32 [N], u's peak and its total Σ exp(u −
    peak), float32 [2, N], and the statistics float32 [3, N] (entropy of π̃, KL(π̃‖π), KL(π‖π̃)), or
    [0] where not asked for."""
    launch.check_rows("adapter_logits", a_NV)
    launch.check_rows("base_logits", b_NV)
    num_rows, num_columns = a_NV.shape
    out_6N = a_NV.new_empty((6, num_rows), dtype=torch.float32)
    stats = a_NV.new_empty((3, num_rows) if statistics else (0,), dtype=torch.float32)
    if num_rows:
        tile = launch.TILES["soft_value_forward"]
        split = launch.split_rows(num_rows, num_columns, tile, a_NV.device)
        partials = None
        if split.programs > 1:
            fields = 7 if statistics else 4
            partials = out_6N.new_empty((fields, num_rows, split.programs))
        pointers = (
            a_NV, b_NV, actions_N.contiguous(),
            None if base_lse_N is None else base_lse_N.to(torch.float32).contiguous(),
            out_6N, stats if statistics else None, partials,
        )
        scalars = coef.alpha_0, coef.alpha_tilde, coef.adapter_coef, coef.base_coef
        zeros = dict(
            ALPHA_0=coef.alpha_0 != 0, ADAPTER_COEF=coef.adapter_coef != 0,
            BASE_COEF=coef.base_coef != 0,
        )
        launch.launch(
            _forward_kernel, (num_rows * split.programs,), *pointers,
            a_NV.stride(0), b_NV.stride(0), num_columns, num_rows, *split,
            coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde, *scalars,
            POLICY_A=coef.adapter_coef != 0, POLICY_B=coef.base_weight != 0,
            FOLD_BASE=base_lse_N is None or statistics, **zeros,
            **launch.lanes(tile, a_NV, b_NV), warps=tile.warps,
        )
        if partials is not None:
            launch.launch(
                _finish_kernel, (num_rows,), *pointers, a_NV.stride(0), b_NV.stride(0),
                num_rows, split.programs, *scalars, **zeros, MAX_SPLITS=launch.MAX_SPLITS, warps=1,
            )
    return *out_6N[:4].unbind(), out_6N[4:], stats


def logits_backward(
    a_NV: Tensor, b_NV: Tensor, actions_N: Tensor, normalizer_2N: Tensor,
    grad_q_N: Tensor, grad_v_N: Tensor, coef: Coefficients, out_NV: Tensor,
) -> None:
    """Write ∂a = c_a·(g·onehot(action) + v·π̃) into ``out_NV``, which may be ``a_NV``. Columns
    outside the policy's support get 0, and so do rows without support and masked rows."""
    for name, x_NV in (("adapter_logits", a_NV), ("base_logits", b_NV), ("out", out_NV)):
        launch.check_rows(name, x_NV)
    if coef.adapter_coef == 0:
        out_NV.zero_()
        return
    num_rows, num_columns = a_NV.shape
    if not out_NV.numel():
        return
    tile = launch.TILES["soft_value_backward"]
    tiles = triton.cdiv(num_columns, tile.columns)
    launch.launch(
        _backward_kernel, (num_rows * tiles,), a_NV, b_NV, actions_N.contiguous(),
        normalizer_2N.contiguous(), grad_q_N.contiguous(), grad_v_N.contiguous(), out_NV,
        a_NV.stride(0), b_NV.stride(0), out_NV.stride(0), num_columns, num_rows, tiles,
        coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde,
        coef.adapter_coef, POLICY_B=coef.base_weight != 0, TILE=tile.columns, warps=tile.warps,
    )
