"""The row kernel of the hidden level: from a product's logits to lse(u), lse(b) and P′.

Row by row: one pass over z (and the base's z) for the log-sum-exps and the statistics, then one
over z that leaves P′ = softmax(u) − onehot(action) where z stood. The second pass wants to find in
L2 what the first has pulled through it, so 32 warps work on one row: the fewer rows are in flight,
the more of each is still there. Pass one asks L2 to keep z, pass two lets go of it.
Shapes: R rows of a chunk, V columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import (
    MASKED_ROW,
    NO_ACTION,
    exp_above,
    finite,
    fold_logsumexp,
    fold_statistics,
    logsumexp_of,
    merge_logsumexp,
    merge_statistics,
    store_statistics,
    tile_columns,
)


@triton.jit
def _logits(z, scale, bias_ptr, columns, inside, action, exact):
    """scale·z + bias; the action's own logit is ``exact`` where there is one (z was rounded to 16
    bits, the exact one is a float32 dot product)."""
    logits = z.to(tl.float32) * scale
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if exact is not None:
        logits = tl.where(columns == action, exact, logits)
    return tl.where(inside, logits, float("-inf"))  # last: padding stays out whatever came before


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    z_ptr, residual_ptr, zb_ptr, actions_ptr, bias_ptr, base_bias_ptr, exact_ptr,
    policy_lse_ptr, base_lse_ptr, stats_ptr,
    z_stride, residual_stride, zb_stride, num_columns, num_rows, scale, base_scale,
    NARROWING: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):
    """One program a row. Absent tensors are None: no base stream, no P′, no statistics."""
    TILE: tl.constexpr = LANES * VEC
    STATISTICS: tl.constexpr = stats_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    action = tl.load(actions_ptr + row)
    keep = action != MASKED_ROW
    end = tl.where(keep, num_columns, 0)  # nothing of a masked row is read
    z_row = z_ptr + row * z_stride
    tile = tile_columns(LANES, VEC, ALIGNED)
    if exact_ptr is not None:
        exact_u = tl.load(exact_ptr + row)
        exact_b = tl.load(exact_ptr + num_rows + row)
    else:
        exact_u = None
        exact_b = None

    peak_u = tl.full((LANES,), float("-inf"), tl.float32)
    peak_b = tl.full((LANES,), float("-inf"), tl.float32)
    total_u, total_b = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    own_u, cross_u = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    gap_b = tl.zeros((LANES,), tl.float32)
    for start in range(0, end, TILE):
        columns = start + tile
        inside = columns < end
        z = tl.load(z_row + columns, mask=inside, other=0.0, eviction_policy="evict_last")
        u = _logits(z, scale, bias_ptr, columns, inside, action, exact_u)
        if zb_ptr is not None:
            zb = tl.load(zb_ptr + row * zb_stride + columns, mask=inside, other=0.0,
                         eviction_policy="evict_first")
            b = _logits(zb, base_scale, base_bias_ptr, columns, inside, action, exact_b)
        if STATISTICS:
            peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b = fold_statistics(
                peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b, u, b
            )
        else:
            peak_u, total_u = fold_logsumexp(peak_u, total_u, u)
            if zb_ptr is not None:
                peak_b, total_b = fold_logsumexp(peak_b, total_b, b)

    if STATISTICS:
        peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b = merge_statistics(
            peak_u, total_u, peak_b, total_b, own_u, cross_u, gap_b
        )
        store_statistics(
            stats_ptr, row, num_rows, keep, total_u, total_b, own_u, cross_u, gap_b
        )
    else:
        peak_u, total_u = merge_logsumexp(peak_u, total_u)
        if zb_ptr is not None:
            peak_b, total_b = merge_logsumexp(peak_b, total_b)
    tl.store(policy_lse_ptr + row, tl.where(keep, logsumexp_of(peak_u, total_u), 0.0))
    if zb_ptr is not None:
        tl.store(base_lse_ptr + row, tl.where(keep, logsumexp_of(peak_b, total_b), 0.0))

    if residual_ptr is not None:
        # P′ overwrites z. At equal widths an element is read and written by one thread. A 16-bit
        # P′ of a float32 z goes to the first half of the row's bytes: tile j, columns [jT, jT+T),
        # lands on the float32 columns [jT/2, jT/2 + T/2). Those are columns of tiles <= j, so
        # walking up, what a tile overwrites has been loaded before, by this warp. By the others:
        # the barrier between a tile's loads and its stores. No second barrier: the next tile's
        # loads lie beyond everything stored so far. (The merges above end pass one the same
        # way: no warp leaves them before all have entered.)
        supported = total_u != 0  # NaN counts as support and is handed on
        reference, per_total = finite(peak_u), 1 / tl.where(supported, total_u, 1.0)
        one_hot = tl.where(supported, action, NO_ACTION)  # a row without support stays zeros
        for start in range(0, num_columns, TILE):
            columns = start + tile
            inside = columns < num_columns
            z = tl.load(z_row + columns, mask=columns < end, other=0.0,
                        eviction_policy="evict_first")
            u = _logits(z, scale, bias_ptr, columns, columns < end, action, exact_u)
            residual = exp_above(u, reference) * per_total
            # In float32, before rounding: where the policy is sure of the action it is ~0.
            residual = tl.where(columns == one_hot, residual - 1.0, residual)
            if NARROWING:
                tl.debug_barrier()
            tl.store(
                residual_ptr + row * residual_stride + columns,
                residual.to(residual_ptr.dtype.element_ty), mask=inside,
            )


def rows_forward(
    z_RV: Tensor, zb_RV: Tensor | None, actions_R: Tensor, scale: float,
    offset_bias_V: Tensor | None, base_scale: float, base_bias_V: Tensor | None,
    write_residual: bool, residual_dtype: torch.dtype, statistics: bool,
    action_logits_2R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """u = scale·z + offset_bias and b = base_scale·zb + base_bias, row by row.

    Args:
        offset_bias_V, base_bias_V: float32 [V], already scaled.
        write_residual: leave P′ in z's memory (``torch_backend.residual_view``): over z itself, or
            16-bit values in the first half of each row's bytes of a float32 z.
        action_logits_2R: exact float32 u and b of each row's action, in place of scale·z's.

    Returns:
        lse(u) [R], lse(b) [R] (empty without zb), statistics [3, R] (empty where not asked for);
        float32.

    Raises:
        ValueError: a residual dtype that can't stand in z's memory; statistics without a base.
    """
    launch.check_rows("z", z_RV)
    if zb_RV is not None:
        launch.check_rows("zb", zb_RV)
    elif statistics:
        raise ValueError("statistics compare two streams: zb is missing")
    narrowing = residual_dtype != z_RV.dtype
    fits = z_RV.dtype == torch.float32 and residual_dtype.itemsize == 2
    if write_residual and narrowing and not fits:
        raise ValueError(f"a {residual_dtype} residual can't stand in a {z_RV.dtype} z's memory")
    num_rows, num_columns = z_RV.shape
    policy_lse_R = z_RV.new_empty(num_rows, dtype=torch.float32)
    base_lse_R = policy_lse_R.new_empty(0 if zb_RV is None else num_rows)
    stats = policy_lse_R.new_empty((3, num_rows) if statistics else (0,))
    if num_rows:
        residual_RV = z_RV.view(residual_dtype) if write_residual else None
        tile = launch.TILES["rows"]
        launch.launch(
            _rows_kernel, (num_rows,), z_RV, residual_RV, zb_RV, actions_R.contiguous(),
            offset_bias_V, base_bias_V,
            None if action_logits_2R is None else action_logits_2R.contiguous(),
            policy_lse_R, None if zb_RV is None else base_lse_R, stats if statistics else None,
            z_RV.stride(0), 0 if residual_RV is None else residual_RV.stride(0),
            0 if zb_RV is None else zb_RV.stride(0), num_columns, num_rows, scale, base_scale,
            NARROWING=write_residual and narrowing, **launch.lanes(tile, z_RV, zb_RV),
            warps=tile.warps,
        )
    return policy_lse_R, base_lse_R, stats
