"""Two streams of logits to the customised policy's log-probabilities, for decoding.

log π̃_w ∝ w·log π̃ + (1 − w)·log π per row (design fact 7); w = 1 where no strength is given. A
constant a row drops out of a log-softmax, so u and b stand in for log π̃ and log π: one
log-sum-exp instead of three. Batches are small here, so both passes spread a row over programs.
Shapes: N rows, V columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Coefficients
from . import launch
from .device import finite, fold_logsumexp, merge_logsumexp, tile_columns, weighted_sum


@triton.jit
def _mixed_logits(
    a_row, b_row, columns, inside, strength, scale_a, scale_b,
    POLICY_A: tl.constexpr, POLICY_B: tl.constexpr, STRENGTH: tl.constexpr,
):
    """w·u + (1 − w)·b; at w = 0 and w = 1 the other stream has no say, not even by a −inf."""
    a = tl.zeros(columns.shape, tl.float32)
    b = tl.zeros(columns.shape, tl.float32)
    if POLICY_A:
        a = tl.load(a_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if POLICY_B or STRENGTH:
        b = tl.load(b_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
    u = weighted_sum(scale_a, a, scale_b, b, POLICY_A, POLICY_B)
    if STRENGTH:
        mixed = weighted_sum(strength, u, 1.0 - strength, b, True, True)
        u = tl.where(strength == 0.0, b, tl.where(strength == 1.0, u, mixed))
    return tl.where(inside, u, float("-inf"))


@triton.jit(do_not_specialize=["num_rows", "splits", "tiles_each"])
def _logsumexp_kernel(
    a_ptr, b_ptr, strength_ptr, partials_ptr, a_stride, b_stride, num_columns,
    num_rows, splits, tiles_each, scale_a, scale_b,
    POLICY_A: tl.constexpr, POLICY_B: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):
    """(peak, total) of one program's part of a row, into partials [2, N, S]."""
    TILE: tl.constexpr = LANES * VEC
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    begin = (program % splits) * tiles_each * TILE
    end = tl.minimum(begin + tiles_each * TILE, num_columns)
    strength = 1.0
    if strength_ptr is not None:
        strength = tl.load(strength_ptr + row)
    peak, total = tl.full((LANES,), float("-inf"), tl.float32), tl.zeros((LANES,), tl.float32)
    for start in range(begin, end, TILE):
        columns = start + tile_columns(LANES, VEC, ALIGNED)
        logits = _mixed_logits(
            a_ptr + row * a_stride, b_ptr + row * b_stride, columns, columns < end, strength,
            scale_a, scale_b, POLICY_A, POLICY_B, strength_ptr is not None,
        )
        peak, total = fold_logsumexp(peak, total, logits)
    peak_row, total_row = merge_logsumexp(peak, total)
    tl.store(partials_ptr + program, peak_row)
    tl.store(partials_ptr + num_rows * splits + program, total_row)


@triton.jit(do_not_specialize=["num_rows", "splits", "tiles"])
def _log_softmax_kernel(
    a_ptr, b_ptr, strength_ptr, partials_ptr, out_ptr, a_stride, b_stride, num_columns,
    num_rows, splits, tiles, scale_a, scale_b,
    POLICY_A: tl.constexpr, POLICY_B: tl.constexpr, MAX_SPLITS: tl.constexpr, TILE: tl.constexpr,
):
    """One program a tile; each merges its row's partials for itself, in the same order."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    part = tl.arange(0, MAX_SPLITS)
    partials = partials_ptr + row * splits + part
    peak, total = merge_logsumexp(
        tl.load(partials, mask=part < splits, other=float("-inf")),
        tl.load(partials + num_rows * splits, mask=part < splits, other=0.0),
    )
    strength = 1.0
    if strength_ptr is not None:
        strength = tl.load(strength_ptr + row)
    columns = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = columns < num_columns
    logits = _mixed_logits(
        a_ptr + row * a_stride, b_ptr + row * b_stride, columns, inside, strength,
        scale_a, scale_b, POLICY_A, POLICY_B, strength_ptr is not None,
    )
    # Peak first: log-probabilities keep their digits whatever offset the logits have in common.
    logprobs = (logits - finite(peak)) - tl.log(tl.where(total == 0, 1.0, total))
    tl.store(out_ptr + row * num_columns + columns, logprobs, mask=inside)


def combine_logits(
    a_NV: Tensor, b_NV: Tensor, coef: Coefficients, strength_N: Tensor | None
) -> Tensor:
    """log π̃ (or log π̃_w with a strength w a row), float32 [N, V]; −inf outside the support."""
    launch.check_rows("adapter_logits", a_NV)
    launch.check_rows("base_logits", b_NV)
    num_rows, num_columns = a_NV.shape
    out_NV = a_NV.new_empty((num_rows, num_columns), dtype=torch.float32)
    if not out_NV.numel():
        return out_NV
    tile = launch.TILES["combine"]
    split = launch.split_rows(num_rows, num_columns, tile, a_NV.device)
    tiles = triton.cdiv(num_columns, tile.columns)
    partials = out_NV.new_empty((2, num_rows, split.programs))
    strength_N = None if strength_N is None else strength_N.to(torch.float32).contiguous()
    strides = a_NV.stride(0), b_NV.stride(0), num_columns, num_rows
    scales = coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde
    streams = dict(POLICY_A=coef.adapter_coef != 0, POLICY_B=coef.base_weight != 0)
    launch.launch(
        _logsumexp_kernel, (num_rows * split.programs,), a_NV, b_NV, strength_N, partials,
        *strides, *split, *scales, **streams,
        **launch.lanes(tile, a_NV, b_NV), warps=tile.warps,
    )
    launch.launch(
        _log_softmax_kernel, (num_rows * tiles,), a_NV, b_NV, strength_N, partials, out_NV,
        *strides, split.programs, tiles, *scales, **streams,
        MAX_SPLITS=launch.MAX_SPLITS, TILE=tile.columns, warps=tile.warps,
    )
    return out_NV
