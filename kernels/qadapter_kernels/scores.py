"""What evaluation asks of a state, straight from hidden states, in chunks of rows.

Per chunk of R rows two products, B = h_b Wᵀ and D = (h_a − h_b) Wᵀ, and one pass over both that
leaves a few numbers a row (``score_rows``). The adapted stream's logits are b + d and never stand
anywhere, so an adapter that does nothing (D = 0) is the base to the last digit: KL 0, equal
log-probabilities, reward 0.

Shapes: N states, D hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, linear
from .checks import (
    check_actions,
    check_head,
    check_like,
    check_matrix,
    exact_products,
    finite,
    workspace_bytes,
)
from .ops import SoftValue
from .reference import Coefficients, LogitHead, ScoreRows, accumulation_dtype


class StateScores(NamedTuple):
    """Per state [N]; float32 (float64 for float64 heads)."""

    base_logprob: Tensor
    """log π(a|s)."""
    policy_logprob: Tensor
    """log π̃(a|s); log π for a model without an adapter."""
    kl_base_policy: Tensor
    """KL(π‖π̃), nats."""
    kl_policy_base: Tensor
    """KL(π̃‖π), nats. Neither is clamped at 0: a mean of rounding errors stays one."""
    same_top1: Tensor
    """Whether a most likely token of π̃ is one of π, bool."""
    soft: SoftValue
    """Under the trained objective, whatever the policy; q and V are 0 where it was not given."""


@torch.no_grad()
def linear_state_scores(
    adapter_hidden: Tensor | None, base_hidden: Tensor, weight: Tensor, actions: Tensor, *,
    policy_weights: tuple[float, float] = (0.0, 1.0), objective: Coefficients | None = None,
    bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None,
    workspace_mb: int = 512, backend: str | None = None,
) -> StateScores:
    """The base π beside a customised policy π̃ = softmax(w_a·a + w_b·b) at N states.

    b = cap(logit_scale·(h_b·weightᵀ + bias)), a likewise of h_a; cap(x) = softcap·tanh(x/softcap).
    Two matrix products (one without ``adapter_hidden``) in the dtype of ``weight``; 16-bit products
    would bias a KL by some −0.0025 nats. No gradient.

    Args:
        adapter_hidden: h_a [N, D], any float dtype; None: π̃ is π.
        base_hidden: h_b [N, D].
        weight: [V, D], float32 or float64.
        actions: token ids [N], integer; -1 where a state has no action.
        policy_weights: (w_a, w_b).
        objective: what q and V of ``soft`` are computed with; it need not be π̃'s.
        bias: [V] or None. logit_scale, workspace_mb, backend: as in ``linear_soft_value``.
        softcap: None for heads that have none.

    Raises:
        ValueError, TypeError, RuntimeError: as ``linear_soft_value``.
    """
    check_matrix("base_hidden", base_hidden)
    if adapter_hidden is not None:
        check_like(
            "adapter_hidden", adapter_hidden, "base_hidden", base_hidden, same_dtype=False
        )
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
    for number in policy_weights:
        finite("policy_weights", number)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    with exact_products(weight.device.type):
        weight, bias = check_head(weight, bias, base_hidden)
        num_rows, vocab_size = len(base_hidden), len(weight)
        actions = check_actions(actions, num_rows, vocab_size, weight.device, None)
        head = linear.Head(weight, bias, finite("logit_scale", logit_scale))
        make = LogitHead(head.logit_scale, head.bias_for(1.0), softcap)
        row_work = dispatch.select(weight, backend, "linear_state_scores")
        product = linear.Product(weight)
        streams = 1 if adapter_hidden is None else 2
        step = linear.chunk_rows(
            num_rows, weight.shape[1], streams * product.bytes_per_row,
            workspace_bytes(workspace_mb), weight.device,
        )
        workspace = product.workspace(streams * step)
        out_8N = weight.new_empty(
            (len(ScoreRows._fields), num_rows), dtype=accumulation_dtype(weight.dtype)
        )
        for rows in linear.steps(num_rows, step):
            h_b = base_hidden[rows].to(weight.dtype)
            base_RV = product.into(h_b, workspace[: len(h_b)])
            difference_RV = None
            if adapter_hidden is not None:
                delta = adapter_hidden[rows].to(weight.dtype) - h_b
                difference_RV = product.into(delta, workspace[step : step + len(h_b)])
            out_8N[:, rows] = row_work.score_rows(
                base_RV, difference_RV, actions[rows], make, policy_weights, objective
            )
    out = ScoreRows(*out_8N.unbind())
    return StateScores(
        out.base_logprob, out.policy_logprob, out.kl_base_policy, out.kl_policy_base,
        out.same_top1 != 0, SoftValue(*out[:4]),
    )
