"""The hidden level: soft values straight from hidden states, in chunks of rows.

With one frozen head W for both streams the policy needs one product only (design fact 5):
u = scale·W·h_z + offset, h_z = h_a + (c_b + α₀)/c_a·h_b. Per chunk of R rows:

    Z  = h_z Wᵀ                      the only [R, V] tensor there is
    lse, P′ = softmax(u) − onehot    the row kernel, P′ in Z's memory
    G′ = P′ W                        [R, D], kept

and the backward pass is elementwise: ∂h_a = c_a·logit_scale·((g + v)·W[action] + v·G′) for any
upstream g = ∂L/∂q_action and v = ∂L/∂V. Nothing is recomputed and no gradient of W is ever formed.
P − onehot rather than P, because with γ near 1 the two terms of ∂h_a nearly cancel where the
policy is sure of the action; the subtraction has to happen in float32, before rounding.
c_a is kept out of h_z (it goes into the scale): in the policy parametrization h_z is then h_a
itself, not rounded once more, and a small α̃ cannot overflow float16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .native import prefer_huge_pages
from .reference import (
    MASKED_ROW,
    Coefficients,
    accumulation_dtype,
    minus_infinity,
    value_from_logsumexps,
    weighted_sum,
)
from .shards import Shard
from .torch_backend import residual_view

CPU_CHUNK_ROWS = 512
"""Every product lays W out anew for the processor: with 256 rows a chunk the two products of 1,024
rows take 199 ms, with 512 rows 170, with 1,024 rows 181 (2 cores, SmolLM2's head)."""
TILE = 128
"""Rows of a matrix-product tile on a GPU."""


class Head(NamedTuple):
    """logits = logit_scale·(h·Wᵀ + bias). Frozen, shared by both streams."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float

    def action_logits(self, actions_N: Tensor, *streams: Tensor) -> list[Tensor]:
        """Exact float32 logit of each row's action [N] in each stream of hidden states [N, D]: a
        gather and dots, no product with W."""
        dtype = accumulation_dtype(streams[0].dtype)
        columns_N = actions_N.clamp_min(0)
        outs = [hidden_ND.new_empty(len(hidden_ND), dtype=dtype) for hidden_ND in streams]
        for rows in _row_blocks(*streams[0].shape):
            w_RD = self.weight[columns_N[rows]].to(dtype)
            for hidden_ND, out_N in zip(streams, outs, strict=True):
                out_N[rows] = (hidden_ND[rows].to(dtype) * w_RD).sum(-1)
        for out_N in outs:
            if self.bias is not None:
                out_N += self.bias[columns_N].to(dtype)
            out_N.mul_(self.logit_scale)
        return outs

    def bias_for(self, weight: float) -> Tensor | None:
        if self.bias is None:
            return None
        bias = self.bias.to(accumulation_dtype(self.weight.dtype))
        # A column that the head excludes stays excluded where the weight is 0 or negative.
        return torch.where(bias == -torch.inf, bias, bias * (weight * self.logit_scale))


def chunk_rows(
    num_rows: int, hidden_size: int, bytes_per_row: int, workspace_bytes: int, device: torch.device
) -> int:
    """Rows of one chunk: as many as the workspace holds, and on a GPU a number that fills whole
    waves of G′ = P′W's tiles (kernels-study §4.3: R = 1,152 reaches 55% of what R = 1,024 does)."""
    cap = max(1, workspace_bytes // bytes_per_row)
    if device.type != "cuda":
        chunks = max(1, -(-num_rows // min(cap, CPU_CHUNK_ROWS)))
        return -(-num_rows // chunks)  # of like size: no last chunk of a few rows
    if cap < TILE:
        return min(cap, num_rows)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    cap = min(cap, -(-num_rows // TILE) * TILE)

    def wave_efficiency(rows: int) -> float:
        tiles = rows // TILE * -(-hidden_size // (2 * TILE))
        return tiles / (-(-tiles // processors) * processors)

    return max(range(TILE, cap + 1, TILE), key=lambda rows: (round(wave_efficiency(rows), 1), rows))


def forward(
    adapter_hidden: Tensor, base_hidden: Tensor, head: Head, actions: Tensor,
    base_logsumexp: Tensor | None, coef: Coefficients, workspace_bytes: int,
    statistics: bool, need_grad: bool, backend: ModuleType, shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns q_action, value, base_logprob, base_logsumexp [N], G′ [N, D] (empty unless
    ``need_grad``), statistics [3, N] (empty unless asked), the policy's log shares [N] (``shards``;
    empty without one; G′ is then this rank's own). Arguments as ``ops.linear_soft_value``.
    """
    num_rows, hidden_size = adapter_hidden.shape
    everywhere, base_is_known = actions, base_logsumexp is not None
    if shard is not None:
        head, actions = shard.head(head), shard.own(actions)
    weight, dtype = head.weight, accumulation_dtype(adapter_hidden.dtype)
    mix = coef.base_weight / coef.adapter_coef
    scale = coef.adapter_coef / coef.alpha_tilde
    offset_bias = head.bias_for(scale + coef.base_weight / coef.alpha_tilde)
    base_bias = head.bias_for(1.0)

    a_action, b_action = head.action_logits(actions, adapter_hidden, base_hidden)
    u_action = weighted_sum(scale, a_action, coef.base_weight / coef.alpha_tilde, b_action)
    # A CPU's products gain nothing from sharing a pass over W, and half the workspace does gain:
    # its pages have to be faulted in every time.
    apart = base_logsumexp is None and weight.device.type == "cpu" and not statistics
    together = base_logsumexp is None and not apart
    product = Product(weight)
    streams = 1 + together
    step = chunk_rows(
        num_rows, hidden_size, streams * product.bytes_per_row, workspace_bytes, weight.device
    )
    workspace = product.workspace(streams * step)
    if apart:
        base_logsumexp = _logsumexp(
            base_hidden, head, actions, b_action, product, workspace, backend
        )

    policy_lse = adapter_hidden.new_empty(num_rows, dtype=dtype)
    base_lse = (
        torch.empty_like(policy_lse) if base_logsumexp is None else base_logsumexp.to(dtype)
    )
    residual_product = weight.new_empty((num_rows if need_grad else 0, hidden_size))
    stats = policy_lse.new_zeros((3, num_rows) if statistics else (0,))

    for rows in steps(num_rows, step):
        hz = adapter_hidden[rows]
        if mix != 0:
            hz = hz.to(dtype) + mix * base_hidden[rows].to(dtype)
        hz = hz.to(weight.dtype)
        count = len(hz)
        # Both streams in one product: each tile of W is read once for the two of them.
        stacked = torch.cat([hz, base_hidden[rows].to(weight.dtype)]) if together else hz
        z = product.into(stacked, workspace[: streams * count])
        exact = None
        if z.element_size() == 2:
            exact = torch.stack([u_action[rows], b_action[rows]])
        policy_lse[rows], base_lse_rows, stats_rows = backend.rows_forward(
            z[:count], z[count:] if together else None, actions[rows],
            scale * head.logit_scale, offset_bias, head.logit_scale, base_bias,
            need_grad, weight.dtype, statistics, exact,
        )
        if together:
            base_lse[rows] = base_lse_rows
        if statistics:
            stats[:, rows] = stats_rows
        if need_grad:
            torch.mm(residual_view(z[:count], weight.dtype), weight, out=residual_product[rows])

    log_shares = policy_lse.new_empty(0)
    if shard is not None:
        actions, lses = everywhere, [policy_lse] if base_is_known else [policy_lse, base_lse]
        (a_action, b_action), (policy_lse, *rest), log_shares, stats = shard.merge(
            actions, torch.stack([a_action, b_action]), torch.stack(lses), stats
        )
        (base_lse,) = rest or (base_lse,)
    has_action, kept = actions >= 0, actions != MASKED_ROW
    q_action = weighted_sum(coef.adapter_coef, a_action, coef.base_coef, b_action)
    value = value_from_logsumexps(policy_lse, base_lse, coef)
    base_logprob = minus_infinity(b_action == -torch.inf, b_action - base_lse, base_lse)
    return (
        torch.where(has_action, q_action, 0.0),
        torch.where(kept, value, 0.0),
        torch.where(has_action, base_logprob, 0.0),
        torch.where(kept, base_lse, 0.0),
        residual_product,
        stats,
        log_shares,
    )


def backward(
    residual_product: Tensor, weight: Tensor, actions: Tensor, grad_q: Tensor, grad_v: Tensor,
    factor: float, out_dtype: torch.dtype, shard: Shard | None, log_shares: Tensor,
) -> Tensor:
    """∂h_a [N, D] = factor·((g + v)·W[action] + v·G′), in float32, rounded once. Of a shard the sum
    of all ranks', each with its share s in front of its G′ (``shards``)."""
    dtype = accumulation_dtype(out_dtype)
    at_action, elsewhere = grad_q + grad_v, grad_v
    if shard is not None:
        weight, actions = shard.rows(weight), shard.own(actions)
        at_action = at_action + grad_v * log_shares.expm1()
        elsewhere = grad_v * log_shares.exp()
    kept_dtype = out_dtype if shard is None else dtype
    out = residual_product.new_empty(residual_product.shape, dtype=kept_dtype)
    at_action = torch.where(actions >= 0, at_action, 0.0) * factor
    elsewhere = torch.where(actions != MASKED_ROW, elsewhere, 0.0) * factor
    for rows in _row_blocks(*residual_product.shape):
        w = weight[actions[rows].clamp_min(0)].to(dtype)
        w.mul_(at_action[rows, None])
        out[rows] = w.addcmul_(residual_product[rows].to(dtype), elsewhere[rows, None])
    return out if shard is None else shard.sum(out).to(out_dtype)


def logsumexp(
    hidden: Tensor, head: Head, actions: Tensor, workspace_bytes: int, backend: ModuleType,
    shard: Shard | None = None,
) -> Tensor:
    """lse of the head's logits [N], float32."""
    everywhere = actions
    if shard is not None:
        head, actions = shard.head(head), shard.own(actions)
    product = Product(head.weight)
    step = chunk_rows(
        len(hidden), hidden.shape[1], product.bytes_per_row, workspace_bytes, hidden.device
    )
    (exact_N,) = head.action_logits(actions, hidden)
    workspace = product.workspace(step)
    lse_N = _logsumexp(hidden, head, actions, exact_N, product, workspace, backend)
    if shard is None:
        return lse_N
    return shard.merge(everywhere, exact_N[None], lse_N[None], lse_N[:0]).logsumexps[0]


def action_logits(
    hidden: Tensor, head: Head, actions: Tensor, shard: Shard | None = None
) -> Tensor:
    """Exact logit of each row's action [N], float32."""
    if shard is None:
        return head.action_logits(actions, hidden)[0]
    own_N = shard.head(head).action_logits(shard.own(actions), hidden)[0]
    return shard.action_logits(actions, own_N[None])[0]


def _logsumexp(
    hidden: Tensor, head: Head, actions: Tensor, exact_N: Tensor, product: Product,
    workspace: Tensor, backend: ModuleType,
) -> Tensor:
    out, bias = torch.empty_like(exact_N), head.bias_for(1.0)
    for rows in steps(len(hidden), len(workspace)):
        chunk = hidden[rows].to(head.weight.dtype)
        z = product.into(chunk, workspace[: len(chunk)])
        exact = exact_N[rows].expand(2, -1).contiguous() if z.element_size() == 2 else None
        out[rows] = backend.rows_forward(
            z, None, actions[rows], head.logit_scale, bias, head.logit_scale, None,
            False, head.weight.dtype, False, exact,
        )[0]
    return out


class _KeptMemory(threading.local):
    """The CPU's workspace, kept from call to call by each thread, as large as the largest yet.

    Memory fresh from the system is faulted in page by page: 50 MB of it cost the first product 60
    ms on top of its 36 (2 cores, SmolLM2's head). A GPU's allocator keeps memory by itself.
    """

    memory: Tensor | None = None

    def of(self, size: int) -> Tensor:
        """Bytes, uint8 [size]."""
        if self.memory is None or len(self.memory) < size:
            self.memory = None  # before the new one is there, not after
            self.memory = prefer_huge_pages(torch.empty(size, dtype=torch.uint8))
        return self.memory[:size]


_KEPT = _KeptMemory()


class Product:
    """h·Wᵀ into a workspace, accumulated and, where the device can, stored in float32.

    A 16-bit logit of size 20 carries an error of 0.04; cuBLAS stores float32 from 16-bit operands
    at the same speed, the CPU's library does not offer it through PyTorch.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        widen = weight.is_cuda and weight.element_size() == 2
        self.dtype = torch.float32 if widen else weight.dtype
        self.bytes_per_row = weight.shape[0] * (4 if widen else weight.element_size())

    def workspace(self, rows: int) -> Tensor:
        """[rows, V], to be used until this thread asks for the next."""
        if self.weight.device.type != "cpu":
            return self.weight.new_empty((rows, self.weight.shape[0]), dtype=self.dtype)
        kept = _KEPT.of(rows * self.bytes_per_row)
        return kept.view(self.dtype).view(rows, self.weight.shape[0])

    def into(self, hidden_RD: Tensor, out_RV: Tensor) -> Tensor:
        if self.dtype == self.weight.dtype:
            return torch.mm(hidden_RD, self.weight.t(), out=out_RV)
        return torch.mm(hidden_RD, self.weight.t(), out_dtype=self.dtype, out=out_RV)


def steps(num_rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, max(1, step)))


def _row_blocks(num_rows: int, hidden_size: int) -> Iterator[slice]:
    """Blocks of rows whose float32 hidden states take at most 64 MiB."""
    return steps(num_rows, max(1, (64 << 20) // (4 * max(1, hidden_size))))
