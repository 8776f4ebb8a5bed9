"""The row work in plain PyTorch: the backend that is always there.

Same interface as the compiled ones. Rows are taken in blocks, so that no float32 [N, V] tensor
is ever held for all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .reference import Coefficients, LogitHead, ScoreRows, accumulation_dtype

NAME = "torch"
BLOCK_BYTES = 64 << 20
"""Float32 bytes of one block of rows: large enough to fill the device, small beside [N, V]."""


def unavailable_reason(device_type: str) -> str | None:
    """Serves every device PyTorch serves."""
    return None


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (4 * max(1, num_columns)))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _statistics_buffer(num_rows: int, wanted: bool, like: Tensor) -> Tensor:
    return like.new_zeros((3, num_rows) if wanted else (0,), dtype=accumulation_dtype(like.dtype))


def logits_forward(
    a_NV: Tensor, b_NV: Tensor, actions_N: Tensor, coef: Coefficients,
    base_lse_N: Tensor | None, statistics: bool,
) -> tuple[Tensor, ...]:
    num_rows, num_columns = a_NV.shape
    outputs_6N = a_NV.new_empty((6, num_rows), dtype=accumulation_dtype(a_NV.dtype))
    stats_3N = _statistics_buffer(num_rows, statistics, a_NV)
    for rows in _blocks(num_rows, num_columns):
        lse = None if base_lse_N is None else base_lse_N[rows]
        out = reference.soft_value(a_NV[rows], b_NV[rows], actions_N[rows], coef, lse)
        outputs_6N[:, rows] = torch.stack([*out[:4], *out.policy_normalizer])
        if statistics:
            stats_3N[:, rows] = torch.stack(out.statistics)
    return *outputs_6N[:4].unbind(), outputs_6N[4:], stats_3N


def logits_backward(
    a_NV: Tensor, b_NV: Tensor, actions_N: Tensor, normalizer_2N: Tensor,
    grad_q_N: Tensor, grad_v_N: Tensor, coef: Coefficients, out_NV: Tensor,
) -> None:
    dtype = accumulation_dtype(a_NV.dtype)
    if coef.adapter_coef == 0:
        out_NV.zero_()
        return
    for rows in _blocks(*a_NV.shape):
        u = reference.policy_logits(a_NV[rows].to(dtype), b_NV[rows].to(dtype), coef)
        peak, total = normalizer_2N[:, rows].unbind()
        grad = _softmax(u, peak, total, actions_N[rows]).mul_(grad_v_N[rows, None])
        _add_at_action(grad, actions_N[rows], grad_q_N[rows])
        masked = actions_N[rows, None] == reference.MASKED_ROW
        grad.masked_fill_((u == -torch.inf) | masked, 0.0)
        out_NV[rows] = grad.mul_(coef.adapter_coef).to(out_NV.dtype)


def rows_forward(
    z_RV: Tensor, zb_RV: Tensor | None, actions_R: Tensor, scale: float,
    offset_bias_V: Tensor | None, base_scale: float, base_bias_V: Tensor | None,
    write_residual: bool, residual_dtype: torch.dtype, statistics: bool,
    action_logits_2R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_columns = z_RV.shape
    dtype = accumulation_dtype(z_RV.dtype)
    policy_lse_R = z_RV.new_empty(num_rows, dtype=dtype)
    base_lse_R = z_RV.new_empty(0 if zb_RV is None else num_rows, dtype=dtype)
    stats_3R = _statistics_buffer(num_rows, statistics, z_RV)
    residual_RV = residual_view(z_RV, residual_dtype)
    for rows in _blocks(num_rows, num_columns):
        exact_2R = None if action_logits_2R is None else action_logits_2R[:, rows]
        actions = actions_R[rows]
        u = _affine(z_RV[rows], scale, offset_bias_V, actions, exact_2R, 0)
        peak, total = reference.peak_and_total(u)
        policy_lse_R[rows] = reference.log_of_total(total) + peak
        if zb_RV is not None:
            b = _affine(zb_RV[rows], base_scale, base_bias_V, actions, exact_2R, 1)
            base_lse_R[rows] = reference.logsumexp(b)
            if statistics:
                stats_3R[:, rows] = torch.stack(reference.policy_statistics(u, b))
        if write_residual:
            residual = _softmax(u, peak, total, actions)
            _add_at_action(residual, actions, torch.where(total != 0, -1.0, 0.0).to(dtype))
            residual_RV[rows] = residual.to(residual_dtype)
    masked_R = actions_R == reference.MASKED_ROW
    policy_lse_R.masked_fill_(masked_R, 0.0)
    base_lse_R.masked_fill_(masked_R if zb_RV is not None else masked_R[:0], 0.0)
    if statistics:
        stats_3R.masked_fill_(masked_R, 0.0)
    return policy_lse_R, base_lse_R, stats_3R


def residual_view(z_RV: Tensor, dtype: torch.dtype) -> Tensor:
    """Where P′ stands after ``rows_forward``: over z itself, or in the first half of each row's
    bytes where z is float32 and P′ is a 16-bit type."""
    return z_RV if z_RV.dtype == dtype else z_RV.view(dtype)[:, : z_RV.shape[1]]


def bradley_terry_forward(
    q_N: Tensor, v_N: Tensor, offsets_S1: Tensor, divisors_S: Tensor, gamma: float,
    chi2_coef: float, bootstrap_next: bool, inv_pairs: float, inv_actions: float,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, preference, chi2, sequence_rewards_S, token_rewards_N = reference.bradley_terry(
        q_N, v_N, offsets_S1, gamma=gamma, chi2_coef=chi2_coef,
        bootstrap="next" if bootstrap_next else "current", divisors=divisors_S,
        num_pairs=1 / inv_pairs, num_actions=1 / inv_actions,
    )
    # Clones where the definition hands back its input (γ = 0): an op's outputs may not alias it.
    token_rewards_N = token_rewards_N.clone() if token_rewards_N is q_N else token_rewards_N
    return torch.stack([loss, preference, chi2]), sequence_rewards_S, token_rewards_N


def bradley_terry_backward(
    token_rewards_N: Tensor, sequence_rewards_S: Tensor, offsets_S1: Tensor, divisors_S: Tensor,
    gamma: float, chi2_coef: float, bootstrap_next: bool, inv_pairs: float, inv_actions: float,
    grad_losses_3: Tensor, grad_sequence_S: Tensor, grad_tokens_N: Tensor,
) -> tuple[Tensor, Tensor]:
    grad_loss, grad_preference, grad_chi2 = grad_losses_3.unbind()
    chosen_B, rejected_B = sequence_rewards_S.tensor_split(2)
    # d(−log σ(m))/dm = −σ(−m), for the chosen; the opposite for the rejected.
    slope_B = -torch.sigmoid(rejected_B - chosen_B) * (grad_loss + grad_preference) * inv_pairs
    grad_R_S = (torch.cat([slope_B, -slope_B]) + grad_sequence_S) / divisors_S
    lengths_S = offsets_S1.diff()
    grad_r_N = torch.repeat_interleave(grad_R_S, lengths_S, output_size=len(token_rewards_N))
    chi2_slope = 2 * inv_actions * (chi2_coef * grad_loss + grad_chi2)
    # A coefficient of 0 reads nothing: 0·inf would be NaN.
    of_squares_N = torch.where(chi2_slope == 0, 0.0, chi2_slope * token_rewards_N)
    grad_r_N = grad_r_N + of_squares_N + grad_tokens_N
    grad_v_N = -gamma * grad_r_N if gamma != 0 else torch.zeros_like(grad_r_N)
    if bootstrap_next:  # V(s_k) enters the reward of the action before it; the first state's none
        grad_v_N = torch.cat([grad_v_N.new_zeros(min(1, len(grad_v_N))), grad_v_N[:-1]])
        grad_v_N[offsets_S1[:-1][lengths_S > 0]] = 0.0
    return grad_r_N, grad_v_N


def combine_logits(
    a_NV: Tensor, b_NV: Tensor, coef: Coefficients, strength_N: Tensor | None
) -> Tensor:
    out_NV = torch.empty_like(a_NV, dtype=accumulation_dtype(a_NV.dtype))
    for rows in _blocks(*a_NV.shape):
        a, b = a_NV[rows].to(out_NV.dtype), b_NV[rows].to(out_NV.dtype)
        u = reference.policy_logits(a, b, coef)
        logp = reference.log_softmax(u)
        if strength_N is not None:
            strength = strength_N[rows, None]
            logpi = reference.log_softmax(b)
            mixed = strength * logp + (1 - strength) * logpi
            mixed = torch.where(torch.minimum(logp, logpi) == -torch.inf, -torch.inf, mixed)
            mixed = torch.where(strength == 0, logpi, torch.where(strength == 1, logp, mixed))
            logp = reference.log_softmax(mixed)
        out_NV[rows] = logp
    return out_NV


def score_rows(
    base_RV: Tensor, difference_RV: Tensor | None, actions_R: Tensor, head: LogitHead,
    policy_weights: tuple[float, float], coef: Coefficients | None,
) -> Tensor:
    """``reference.score_rows`` from products: b = head(h_b·Wᵀ) and a = b + d, where d is what the
    product of h_a − h_b adds. Policies are mixtures of b and d, so that d = 0 is the base exactly.

    Args:
        difference_RV: None for a model without an adapter.
        policy_weights: (w_a, w_b) of π̃. coef: the trained objective's, or None: q and V are then 0.

    Returns:
        [8, R], the fields of ``ScoreRows``.
    """
    num_rows, num_columns = base_RV.shape
    outputs_8R = base_RV.new_zeros((len(ScoreRows._fields), num_rows))
    for rows in _blocks(num_rows, num_columns):
        actions = actions_R[rows]
        products = base_RV[rows]
        b = head(products)
        lse, base_logprob = _logsumexp_and_logprob(b, actions)
        found = {"base_logprob": base_logprob, "base_logsumexp": lse,
                 "policy_logprob": base_logprob, "same_top1": torch.ones_like(lse)}
        if difference_RV is not None:
            d = difference_RV[rows] * head.scale
            if head.softcap is not None:
                d = head(products + difference_RV[rows]).sub_(b)
            z = _mixture(b, d, *policy_weights)
            statistics = reference.policy_statistics(z, b)
            policy_lse, policy_logprob = _logsumexp_and_logprob(z, actions)
            same = (z == z.amax(-1, True)) & (b == b.amax(-1, True))
            found |= {"policy_logprob": policy_logprob, "same_top1": same.any(-1).to(b.dtype),
                      "kl_base_policy": statistics.kl_base_policy,
                      "kl_policy_base": statistics.kl_policy_base}
            if coef is not None:
                weights = coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde
                if weights != tuple(policy_weights):
                    policy_lse, _ = _logsumexp_and_logprob(_mixture(b, d, *weights), actions)
                q = _mixture(b, d, coef.adapter_coef, coef.base_coef)
                q = q.gather(1, actions.clamp_min(0)[:, None])[:, 0]
                found |= {"q_action": torch.where(actions >= 0, q, 0.0),
                          "value": reference.value_from_logsumexps(policy_lse, lse, coef)}
        for name, x in found.items():
            outputs_8R[ScoreRows._fields.index(name), rows] = x
    return outputs_8R


def _mixture(b: Tensor, d: Tensor, weight_a: float, weight_b: float) -> Tensor:
    """weight_a·(b + d) + weight_b·b, −inf where b is."""
    total = (weight_a + weight_b) * b + weight_a * d
    return torch.where(b == -torch.inf, -torch.inf, total)


def _logsumexp_and_logprob(x: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row; log-probability 0 where there is no action."""
    peak, log_total = reference.peak_and_log_total(x)
    at_action = x.gather(1, actions.clamp_min(0)[:, None])[:, 0]
    logprob = (at_action - peak) - log_total
    logprob = reference.minus_infinity(at_action == -torch.inf, logprob, log_total)
    return log_total + peak, torch.where(actions >= 0, logprob, 0.0)


def _affine(
    z: Tensor, scale: float, bias_V: Tensor | None, actions: Tensor, exact_2R: Tensor | None,
    which: int,
) -> Tensor:
    logits = z.to(accumulation_dtype(z.dtype)) * scale
    if bias_V is not None:
        logits += bias_V
    if exact_2R is not None:
        column = actions.clamp_min(0)[:, None]
        rounded = logits.gather(1, column)
        exact = torch.where(column == actions[:, None], exact_2R[which, :, None], rounded)
        logits.scatter_(1, column, exact)
    return logits


def _softmax(u: Tensor, peak: Tensor, total: Tensor, actions: Tensor) -> Tensor:
    """exp(u − peak)/total; zeros for a row without support and for a masked row."""
    dead = (total == 0) | (actions == reference.MASKED_ROW)
    weight = (u - peak[:, None]).exp_().mul_(1 / torch.where(dead, 1.0, total)[:, None])
    return weight.masked_fill_(dead[:, None], 0.0)


def _add_at_action(x: Tensor, actions: Tensor, amount: Tensor) -> None:
    amount = torch.where(actions >= 0, amount, 0.0)
    x.scatter_add_(1, actions.clamp_min(0)[:, None], amount[:, None].to(x.dtype))
