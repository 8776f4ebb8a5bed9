"""The definition, in plain PyTorch: what every backend is tested against.

Any device, any floating dtype, differentiable by autograd. Nothing here is fast and nothing is
clever: a reader should be able to hold each function against the equations in one look.

Shapes: N rows (states), V vocabulary, S = 2B sequences (chosen 0..B-1, rejected B..2B-1).
Source: Q-Adapter (Li et al., ICLR 2025, arXiv 2407.03856), eqs. for π̃, V and r₂.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_ACTION = -1
"""Action of a row that has a value but no action."""
MASKED_ROW = -2
"""Internal action of a row that is masked out: every output and its gradient are 0."""


class Coefficients(NamedTuple):
    """The four numbers that turn two streams of logits into a policy and a value.

    q = adapter_coef·a + base_coef·b;  u = (q + alpha_0·b) / alpha_tilde.
    """

    alpha_0: float
    alpha_tilde: float = 1.0
    adapter_coef: float = 1.0
    base_coef: float = 0.0

    @property
    def base_weight(self) -> float:
        """Weight of the base's logits in alpha_tilde·u. Exactly 0 for the policy parametrization
        at the α's it was trained with: there the adapted stream alone is the policy."""
        return self.base_coef + self.alpha_0


class PolicyStatistics(NamedTuple):
    """How far the customised policy π̃ stands from the base π at each state. float32 [N], nats. Like
    all outputs 0 at rows masked out, whatever their logits: leave those out of a mean."""

    entropy: Tensor
    """Entropy of π̃."""
    kl_policy_base: Tensor
    """KL(π̃‖π)."""
    kl_base_policy: Tensor
    """KL(π‖π̃): what was forgotten."""


class DefinitionOutput(NamedTuple):
    q_action: Tensor
    value: Tensor
    base_logprob: Tensor
    base_logsumexp: Tensor
    policy_normalizer: Tensor
    """[2, N]: the largest u (0 where it is infinite) and Σ exp(u − largest), 0 without support.
    Apart, because a rounded lse(u) is off by half its last place: 5e-4 at 10⁴."""
    statistics: PolicyStatistics


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logsumexp(x_NV: Tensor) -> Tensor:
    """Row-wise log-sum-exp; -inf (with a zero gradient, not NaN) for a row of -inf."""
    peak_N, log_total_N = peak_and_log_total(x_NV)
    return log_total_N + peak_N


def peak_and_log_total(x_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of a log-sum-exp: max m (0 where it is infinite) and log Σ exp(x − m)."""
    peak_N, total_N = peak_and_total(x_NV)
    return peak_N, log_of_total(total_N)


def peak_and_total(x_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The same before the logarithm. NaN in a row is NaN in both."""
    peak_N = x_NV.detach().amax(-1)
    peak_N = torch.where(torch.isinf(peak_N), 0.0, peak_N)
    return peak_N, (x_NV - peak_N[:, None]).exp().sum(-1)


def log_of_total(total_N: Tensor) -> Tensor:
    """-inf (with a zero gradient, not NaN) for 0."""
    empty_N = total_N == 0
    return torch.where(empty_N, -torch.inf, torch.where(empty_N, 1.0, total_N).log())


def minus_infinity(where: Tensor, x: Tensor, *parts: Tensor) -> Tensor:
    """x with -inf where a token or a whole row is excluded (-inf − -inf would be NaN there). Only
    that NaN: where one of the ``parts`` that x is made of is NaN, x is NaN and stays it."""
    for part in parts:
        where = where & ~part.isnan()
    return torch.where(where, -torch.inf, x)


def log_softmax(x_NV: Tensor) -> Tensor:
    """Row-wise log-softmax; a row of -inf stays one. Peak first: an offset costs no digits."""
    peak_N, log_total_N = peak_and_log_total(x_NV)
    log_total_N = torch.where(log_total_N == -torch.inf, 0.0, log_total_N)
    return (x_NV - peak_N[:, None]).sub_(log_total_N[:, None])


def weighted_sum(weight_a: float, a: Tensor, weight_b: float, b: Tensor) -> Tensor:
    """weight_a·a + weight_b·b, where a stream of weight 0 is not looked at (0·inf would be NaN)
    and -inf in either stream is -inf in the sum, whatever the signs: what one stream excludes stays
    excluded. NaN in a stream that counts is NaN in the sum, beside -inf too."""
    streams = [(w, x) for w, x in ((weight_a, a), (weight_b, b)) if w != 0]
    if not streams:
        return torch.zeros_like(a)
    lowest = streams[0][1] if len(streams) == 1 else torch.minimum(*(x for _, x in streams))
    excluded = lowest == -torch.inf  # minimum() keeps NaN
    total = sum(w * torch.where(excluded, 0.0, x) for w, x in streams)
    return torch.where(excluded, -torch.inf, total)


def policy_logits(a_NV: Tensor, b_NV: Tensor, coef: Coefficients) -> Tensor:
    """u = (q + α₀·b)/α̃: the customised policy's logits, up to a constant a row."""
    scale_a = coef.adapter_coef / coef.alpha_tilde
    return weighted_sum(scale_a, a_NV, coef.base_weight / coef.alpha_tilde, b_NV)


def value_from_logsumexps(
    policy_lse_N: Tensor, base_lse_N: Tensor, coef: Coefficients,
    policy_peak_N: Tensor | float = 0.0, base_peak_N: Tensor | float = 0.0,
) -> Tensor:
    """V = α̃·lse(u) − α₀·lse(b); -inf where the policy has no support left. Where the peaks are
    given, the log-sum-exps are those above them: what the streams have in common cancels first."""
    value_N = coef.alpha_tilde * policy_lse_N
    if coef.alpha_0 == 0:
        return coef.alpha_tilde * policy_peak_N + value_N
    common_N = coef.alpha_tilde * policy_peak_N - coef.alpha_0 * base_peak_N
    value_N = common_N + (value_N - coef.alpha_0 * base_lse_N)
    return minus_infinity(policy_lse_N == -torch.inf, value_N, base_lse_N)


def policy_statistics(u_NV: Tensor, b_NV: Tensor) -> PolicyStatistics:
    """Entropy and both divergences; a column of zero probability contributes 0."""
    logp_NV, logpi_NV = log_softmax(u_NV), log_softmax(b_NV)

    def expectation(logweight_NV: Tensor, *terms: Tensor) -> Tensor:
        weight_NV = logweight_NV.exp()
        difference_NV = terms[0] if len(terms) == 1 else terms[0] - terms[1]
        return torch.where(weight_NV == 0, 0.0, weight_NV * difference_NV).sum(-1)

    return PolicyStatistics(
        entropy=-expectation(logp_NV, logp_NV),
        kl_policy_base=expectation(logp_NV, logp_NV, logpi_NV),
        kl_base_policy=expectation(logpi_NV, logpi_NV, logp_NV),
    )


def soft_value(
    adapter_logits: Tensor, base_logits: Tensor, actions: Tensor, coef: Coefficients,
    base_logsumexp: Tensor | None = None,
) -> DefinitionOutput:
    """Soft value and residual Q of N states, from two [N, V] tensors of logits.

    Differentiable in ``adapter_logits``. ``actions`` [N]: -1 for no action, -2 for a masked row.
    """
    dtype = accumulation_dtype(adapter_logits.dtype)
    a_NV, b_NV = adapter_logits.to(dtype), base_logits.detach().to(dtype)
    keep_N, has_action_N = actions != MASKED_ROW, actions >= 0

    u_NV = policy_logits(a_NV, b_NV, coef)
    policy_peak_N, policy_total_N = peak_and_total(u_NV)
    if base_logsumexp is None:
        peak_N, log_total_N = peak_and_log_total(b_NV)
    else:
        log_total_N = base_logsumexp.to(dtype)
        peak_N = torch.zeros_like(log_total_N)
    base_lse_N = log_total_N + peak_N
    value_N = value_from_logsumexps(
        log_of_total(policy_total_N), log_total_N, coef, policy_peak_N, peak_N
    )

    column_N1 = actions.clamp_min(0)[:, None]
    a_action_N, b_action_N = (x.gather(1, column_N1)[:, 0] for x in (a_NV, b_NV))
    q_action_N = weighted_sum(coef.adapter_coef, a_action_N, coef.base_coef, b_action_N)
    # Not b[a] − lse(b): under a large common offset that would lose the digits of a small log π.
    base_logprob_N = (b_action_N - peak_N) - log_total_N
    base_logprob_N = minus_infinity(b_action_N == -torch.inf, base_logprob_N, log_total_N)

    def rows(x_N: Tensor, where_N: Tensor) -> Tensor:
        return torch.where(where_N, x_N, 0.0)

    statistics = policy_statistics(u_NV.detach(), b_NV)
    return DefinitionOutput(
        q_action=rows(q_action_N, has_action_N),
        value=rows(value_N, keep_N),
        base_logprob=rows(base_logprob_N, has_action_N),
        base_logsumexp=rows(base_lse_N, keep_N),
        policy_normalizer=rows(torch.stack([policy_peak_N, policy_total_N.detach()]), keep_N),
        statistics=PolicyStatistics(*(rows(x_N, keep_N) for x_N in statistics)),
    )


class ScoreRows(NamedTuple):
    """What evaluation asks of a state, a number a row each, in the order of ``score_rows``."""

    q_action: Tensor
    value: Tensor
    base_logprob: Tensor
    base_logsumexp: Tensor
    policy_logprob: Tensor
    """log π̃(a|s)."""
    kl_base_policy: Tensor
    """KL(π‖π̃), nats."""
    kl_policy_base: Tensor
    """KL(π̃‖π), nats."""
    same_top1: Tensor
    """1 where a most likely token of π̃ is one of π, else 0."""


def score_rows(
    a_NV: Tensor, b_NV: Tensor, actions: Tensor, policy_weights: tuple[float, float],
    coef: Coefficients,
) -> ScoreRows:
    """The base beside π̃ = softmax(w_a·a + w_b·b), and q and V under a trained objective.

    ``actions`` [N]: -1 for no action. ``policy_weights``: (w_a, w_b).
    """
    soft = soft_value(a_NV, b_NV, actions, coef)
    z_NV = weighted_sum(policy_weights[0], a_NV, policy_weights[1], b_NV)
    statistics = policy_statistics(z_NV, b_NV)
    column_N1 = actions.clamp_min(0)[:, None]
    policy_logprob = log_softmax(z_NV).gather(1, column_N1)[:, 0]
    tops = (x_NV == x_NV.amax(-1, True) for x_NV in (z_NV, b_NV))
    return ScoreRows(
        soft.q_action, soft.value, soft.base_logprob, soft.base_logsumexp,
        torch.where(actions >= 0, policy_logprob, 0.0), statistics.kl_base_policy,
        statistics.kl_policy_base, torch.logical_and(*tops).any(-1).to(b_NV.dtype),
    )


class LogitHead(NamedTuple):
    """Products to logits: cap(scale·product + bias), cap(x) = softcap·tanh(x / softcap)."""

    scale: float = 1.0
    bias: Tensor | None = None
    """[V], already scaled."""
    softcap: float | None = None

    def __call__(self, products_NV: Tensor) -> Tensor:
        logits_NV = products_NV if self.scale == 1.0 else products_NV * self.scale
        logits_NV = logits_NV if self.bias is None else logits_NV + self.bias
        return logits_NV if self.softcap is None else torch.tanh(logits_NV / self.softcap).mul_(
            self.softcap
        )


def linear_soft_value(
    adapter_hidden: Tensor, base_hidden: Tensor, weight: Tensor, actions: Tensor,
    coef: Coefficients, bias: Tensor | None = None, logit_scale: float = 1.0,
    base_logsumexp: Tensor | None = None,
) -> DefinitionOutput:
    """The same from hidden states [N, D] through one frozen head:
    logits = logit_scale·(h·Wᵀ + bias)."""
    hidden = (adapter_hidden, base_hidden.detach())
    a_NV, b_NV = (logit_scale * F.linear(h_ND, weight, bias) for h_ND in hidden)
    return soft_value(a_NV, b_NV, actions, coef, base_logsumexp)


def bradley_terry(
    q_action: Tensor, value: Tensor, sequence_offsets: Tensor, *, gamma: float, chi2_coef: float,
    bootstrap: str, divisors: Tensor, num_pairs: float, num_actions: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Bradley–Terry over ragged sequences plus the χ² term. Differentiable in q_action and value.

    Sequence i owns rows offsets[i]:offsets[i+1]; pair i is (i, B+i).
    Returns (loss, preference_loss, chi2_loss, sequence_rewards [S], token_rewards [N]).
    """
    num_sequences = sequence_offsets.numel() - 1
    lengths_S = sequence_offsets.diff()
    sequence_N = torch.repeat_interleave(
        torch.arange(num_sequences, device=value.device), lengths_S, output_size=value.numel()
    )
    if bootstrap == "next":  # V of the state that follows; 0 after a sequence's last action
        following_N = torch.cat([value[1:], value.new_zeros(min(1, value.numel()))])
        last_N = torch.zeros_like(value, dtype=torch.bool)
        last_N[sequence_offsets[1:][lengths_S > 0] - 1] = True
        following_N = torch.where(last_N, 0.0, following_N)
    else:
        following_N = value
    token_rewards_N = q_action - gamma * following_N if gamma != 0 else q_action
    sequence_rewards_S = value.new_zeros(num_sequences).index_add(0, sequence_N, token_rewards_N)
    sequence_rewards_S = sequence_rewards_S / divisors
    chosen_B, rejected_B = sequence_rewards_S.tensor_split(2)
    preference_loss = -F.logsigmoid(chosen_B - rejected_B).sum() / num_pairs
    chi2_loss = token_rewards_N.square().sum() / num_actions
    # A coefficient of 0 reads nothing: 0·inf would be NaN.
    loss = preference_loss + chi2_coef * chi2_loss if chi2_coef != 0 else preference_loss
    return loss, preference_loss, chi2_loss, sequence_rewards_S, token_rewards_N
