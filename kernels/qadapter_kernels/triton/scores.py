"""Evaluation's row kernel: all that is asked of the base and a policy at one state, in one pass.

Shapes: R rows of a chunk, V columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Coefficients, LogitHead, ScoreRows
from . import launch
from .device import (
    LOG2E,
    finite,
    fold_logsumexp,
    fold_statistics,
    logsumexp_of,
    merge_logsumexp,
    merge_statistics,
    tile_columns,
)


@triton.jit
def _tanh(x):
    """From exp(−2|x|); near 0, where that would cancel, by the series up to x¹¹."""
    size, square = tl.abs(x), x * x
    e = tl.exp2(size * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    p = -1382.0 / 155925.0 * square + 62.0 / 2835.0
    p = p * square - 17.0 / 315.0
    p = p * square + 2.0 / 15.0
    p = p * square - 1.0 / 3.0
    return tl.where(size > 0.25, far, x + x * (p * square))


@triton.jit
def _streams(
    base, difference, bias_ptr, columns, inside, scale, softcap, SOFTCAP: tl.constexpr,
    CUSTOMISED: tl.constexpr,
):
    """b, and d = a − b from what the product of the hidden states' difference is."""
    x = base * scale
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    b, d = x, difference * scale
    if SOFTCAP:
        t = _tanh(x / softcap)
        b = softcap * t
        if CUSTOMISED:  # the difference before the factor: a fused b would not cancel to 0
            d = softcap * (_tanh((x + d) / softcap) - t)
    return tl.where(inside, b, float("-inf")), d


@triton.jit
def _mixture(b, d, weight_b, weight_d):
    """−inf wherever the base is; b itself where d is 0 and its weight 1."""
    return tl.where(b == float("-inf"), float("-inf"), weight_b * b + weight_d * d)


@triton.jit
def _fold_tops(same, peak_u, peak_b, top_u, top_b, u, b):
    """Whether a column holds both of a lane's largest logits, which are now (top_u, top_b)."""
    here = (u == top_u[:, None]) & (b == top_b[:, None])
    kept = (peak_u == top_u) & (peak_b == top_b)
    return tl.maximum(tl.where(kept, same, 0), tl.max(here.to(tl.int32), axis=1))


@triton.jit
def _log_probability(logit, peak, total):
    logprob = (logit - finite(peak)) - tl.log(tl.where(total == 0, 1.0, total))
    return tl.where((logit == float("-inf")) & (total == total), float("-inf"), logprob)


@triton.jit(do_not_specialize=["num_rows"])
def _score_kernel(
    base_ptr, difference_ptr, bias_ptr, actions_ptr, out_ptr, base_stride, difference_stride,
    num_columns, num_rows, scale, softcap, policy_b, policy_d, trained_b, trained_d,
    q_b, q_d, alpha_0, alpha_tilde,
    SOFTCAP: tl.constexpr, REWARDS: tl.constexpr, TRAINED: tl.constexpr, ALPHA_0: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):
    """One program a row; no difference: a model without an adapter."""
    TILE: tl.constexpr = LANES * VEC
    CUSTOMISED: tl.constexpr = difference_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    tile = tile_columns(LANES, VEC, ALIGNED)
    lowest = tl.full((LANES,), float("-inf"), tl.float32)
    zeros = tl.zeros((LANES,), tl.float32)
    peak_u, peak_b, peak_t = lowest, lowest, lowest
    total_u, total_b, total_t = zeros, zeros, zeros
    own_u, cross_u, gap_b = zeros, zeros, zeros
    same = tl.zeros((LANES,), tl.int32)
    for start in range(0, num_columns, TILE):
        columns = start + tile
        inside = columns < num_columns
        base = tl.load(base_ptr + row * base_stride + columns, mask=inside, other=0.0)
        difference = tl.zeros_like(base)
        if CUSTOMISED:
            difference = tl.load(
                difference_ptr + row * difference_stride + columns, mask=inside, other=0.0
            )
        b, d = _streams(
            base, difference, bias_ptr, columns, inside, scale, softcap, SOFTCAP, CUSTOMISED
        )
        if CUSTOMISED:
            u = _mixture(b, d, policy_b, policy_d)
            before_u, before_b = peak_u, peak_b
            peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b = fold_statistics(
                peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b, u, b
            )
            same = _fold_tops(
                same, before_u, before_b, peak_u, peak_b, u, tl.where(inside, b, float("inf"))
            )
            if TRAINED:
                peak_t, total_t = fold_logsumexp(
                    peak_t, total_t, _mixture(b, d, trained_b, trained_d)
                )
        else:
            peak_b, total_b = fold_logsumexp(peak_b, total_b, b)

    action = tl.load(actions_ptr + row)
    at = tl.maximum(action, 0)
    there = action >= 0
    difference = 0.0
    if CUSTOMISED:
        difference = tl.load(difference_ptr + row * difference_stride + at)
    b, d = _streams(
        tl.load(base_ptr + row * base_stride + at), difference, bias_ptr, at, there, scale,
        softcap, SOFTCAP, CUSTOMISED,
    )
    q, value, kl_base, kl_policy, top = 0.0, 0.0, 0.0, 0.0, 1.0
    if CUSTOMISED:
        lane_u, lane_b = peak_u, peak_b
        peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b = merge_statistics(
            peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b
        )
        top = tl.max(tl.where((lane_u == peak_u) & (lane_b == peak_b), same, 0)).to(tl.float32)
        # Peaks may pass over NaN; a row that holds one has no top token.
        top = tl.where((total_u == total_u) & (total_b == total_b), top, 0.0)
        some_u, some_b = total_u != 0, total_b != 0  # a NaN stays one
        log_u = tl.log(tl.where(some_u, total_u, 1.0))
        log_b = tl.log(tl.where(some_b, total_b, 1.0))
        kl_policy = (own_u - cross_u) / tl.where(some_u, total_u, 1.0) - log_u + log_b
        kl_base = gap_b / tl.where(some_b, total_b, 1.0) - log_b + log_u
        kl_policy = tl.where(some_u, kl_policy, 0.0)
        kl_base = tl.where(some_b, kl_base, 0.0)
        policy_logprob = _log_probability(_mixture(b, d, policy_b, policy_d), peak_u, total_u)
    else:
        peak_b, total_b = merge_logsumexp(peak_b, total_b)
        policy_logprob = _log_probability(b, peak_b, total_b)
    base_lse = logsumexp_of(peak_b, total_b)
    if REWARDS:
        if TRAINED:
            peak_t, total_t = merge_logsumexp(peak_t, total_t)
        else:
            peak_t, total_t = peak_u, total_u
        lse = logsumexp_of(peak_t, total_t)
        value = alpha_tilde * lse
        if ALPHA_0:
            dead = (lse == float("-inf")) & (base_lse == base_lse)
            value = tl.where(dead, float("-inf"), value - alpha_0 * base_lse)
        q = _mixture(b, d, q_b, q_d)

    out = out_ptr + row
    tl.store(out, tl.where(there, q, 0.0))
    tl.store(out + num_rows, value)
    tl.store(out + 2 * num_rows, tl.where(there, _log_probability(b, peak_b, total_b), 0.0))
    tl.store(out + 3 * num_rows, base_lse)
    tl.store(out + 4 * num_rows, tl.where(there, policy_logprob, 0.0))
    tl.store(out + 5 * num_rows, kl_base)
    tl.store(out + 6 * num_rows, kl_policy)
    tl.store(out + 7 * num_rows, top)


def score_rows(
    base_RV: Tensor, difference_RV: Tensor | None, actions_R: Tensor, head: LogitHead,
    policy_weights: tuple[float, float], coef: Coefficients | None,
) -> Tensor:
    """As ``torch_backend.score_rows``, of float32 products."""
    for name, x_RV in (("base", base_RV), ("difference", difference_RV)):
        if x_RV is not None:
            launch.check_rows(name, x_RV)
            if x_RV.dtype != torch.float32:
                raise TypeError(f"scores are made of float32 products, not {x_RV.dtype}")
    num_rows, num_columns = base_RV.shape
    out_8R = base_RV.new_empty((len(ScoreRows._fields), num_rows))
    if not num_rows:
        return out_8R
    rewards = coef is not None and difference_RV is not None
    coef = coef or Coefficients(0.0)
    trained = coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde
    tile = launch.TILES["scores"]
    launch.launch(
        _score_kernel, (num_rows,), base_RV, difference_RV,
        None if head.bias is None else head.bias.to(torch.float32).contiguous(),
        actions_R.contiguous(), out_8R, base_RV.stride(0),
        0 if difference_RV is None else difference_RV.stride(0), num_columns, num_rows,
        head.scale, head.softcap or 1.0,
        *(x for w_a, w_b in (policy_weights, trained, (coef.adapter_coef, coef.base_coef))
          for x in (w_a + w_b, w_a)),
        coef.alpha_0, coef.alpha_tilde,
        SOFTCAP=head.softcap is not None, REWARDS=rewards,
        TRAINED=rewards and trained != tuple(policy_weights), ALPHA_0=coef.alpha_0 != 0,
        **launch.lanes(tile, base_RV, difference_RV), warps=tile.warps,
    )
    return out_8R
