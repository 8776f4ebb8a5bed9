"""Cases and the float64 definition of the row kernel (``rows_forward``), for every backend's tests.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from cases import assert_close_as_eager
from torch import Tensor

from qadapter_kernels import reference
from qadapter_kernels.torch_backend import residual_view


class RowCase(NamedTuple):
    """Arguments of ``rows_forward``, by name."""

    z: Tensor
    zb: Tensor | None
    actions: Tensor
    scale: float
    offset_bias: Tensor | None
    base_scale: float
    base_bias: Tensor | None
    action_logits: Tensor | None


class RowResult(NamedTuple):
    policy_lse: Tensor
    base_lse: Tensor
    statistics: Tensor
    residual: Tensor


def guarded(x_RV: Tensor, stride: int | None = None, offset: int = 0) -> Tensor:
    """A copy inside a larger buffer of NaN: rows ``stride`` elements apart, the first ``offset``
    after an aligned address. Reading outside poisons results; ``guards_hold`` sees writes."""
    rows, columns = x_RV.shape
    stride = columns if stride is None else stride
    size = (offset + rows * stride + 64,)
    buffer = torch.full(size, torch.nan, dtype=x_RV.dtype, device=x_RV.device)
    view = buffer.as_strided((rows, columns), (stride, 1), offset)
    return view.copy_(x_RV)


def guards_hold(view_RV: Tensor) -> bool:
    rows, columns = view_RV.shape
    storage = view_RV.new_empty(0).set_(view_RV.untyped_storage())
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided((rows, columns), view_RV.stride(), view_RV.storage_offset()).fill_(False)
    return bool(storage[outside].isnan().all())


def row_case(
    rows: int = 6, vocab: int = 130, dtype: torch.dtype = torch.float32, base: bool = True,
    bias: bool = False, exact: bool = False, stride: int | None = None, offset: int = 0,
    base_offset: int | None = None, seed: int = 0, device: str = "cpu",
) -> RowCase:
    """The first row's action is the last column, the second row has none, the third is masked out
    (and holds NaN), the fourth is sure of its action."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    z, zb = 4 * normal(rows, vocab), 4 * normal(rows, vocab)
    actions = torch.randint(vocab, (rows,), generator=generator).to(device)
    actions[:1], actions[1:2], actions[2:3] = vocab - 1, -1, -2
    z[2:3], zb[2:3] = torch.nan, torch.nan
    if rows > 3:
        z[3, actions[3]] = 40.0
    base_offset = offset if base_offset is None else base_offset
    z, zb = guarded(z.to(dtype), stride, offset), guarded(zb.to(dtype), stride, base_offset)
    columns = actions.clamp_min(0)[:, None]
    unrounded = torch.stack([x.gather(1, columns)[:, 0].float() for x in (z, zb)])
    return RowCase(
        z, zb if base else None, actions, 0.7, normal(vocab) if bias else None, 1.3,
        normal(vocab) if bias else None,
        unrounded * unrounded.new_tensor([[0.7], [1.3]]) + 0.01 * normal(2, rows)
        if exact else None,
    )


def definition(case: RowCase, dtype: torch.dtype = torch.float64) -> RowResult:
    """Row by row as the interface says it; a masked row is all zeros."""
    rows, vocab = case.z.shape
    base_rows = rows if case.zb is not None else 0
    shapes = ((rows,), (base_rows,), (3, rows), (rows, vocab))
    out = [torch.zeros(shape, dtype=dtype, device=case.z.device) for shape in shapes]
    for i, action in enumerate(case.actions.tolist()):
        if action == -2:
            continue

        def logits(z_RV, scale, bias, which, i=i, action=action):
            x = z_RV[i].to(dtype) * scale + (0 if bias is None else bias.to(dtype))
            if case.action_logits is not None and action >= 0:
                x[action] = case.action_logits[which, i].to(dtype)
            return x

        u = logits(case.z, case.scale, case.offset_bias, 0)
        out[0][i] = lse = reference.logsumexp(u[None])[0]
        if lse != -torch.inf:
            out[3][i] = (u - lse).exp()
            if action >= 0:
                out[3][i, action] -= 1
        if case.zb is not None:
            b = logits(case.zb, case.base_scale, case.base_bias, 1)
            out[1][i] = reference.logsumexp(b[None])[0]
            out[2][:, i] = torch.stack(reference.policy_statistics(u[None], b[None]))[:, 0]
    return RowResult(*out)


def run(
    backend: ModuleType, case: RowCase, residual_dtype: torch.dtype | None, statistics: bool
) -> RowResult:
    """``residual_dtype`` None: no residual is asked for. P′ replaces z in case.z's memory."""
    wanted, dtype = residual_dtype is not None, residual_dtype or case.z.dtype
    outputs = backend.rows_forward(
        case.z, case.zb, case.actions, case.scale, case.offset_bias, case.base_scale,
        case.base_bias, wanted, dtype, statistics, case.action_logits,
    )
    return RowResult(*outputs, residual_view(case.z, dtype) if wanted else case.z[:, :0])


def check(result: RowResult, exact: RowResult, eager: RowResult) -> None:
    """``exact`` and ``eager``: the definition in float64 and in float32, taken before the run."""
    size = 1 + float(exact.policy_lse[exact.policy_lse.isfinite()].abs().max())
    scales = RowResult(size, size, 4 * size, size)
    for name, x, y, z, s in zip(RowResult._fields, result, exact, eager, scales, strict=True):
        if x.numel():
            assert x.shape == y.shape, name
            assert_close_as_eager(x, y, z, s, name)
