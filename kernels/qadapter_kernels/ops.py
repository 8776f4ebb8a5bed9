"""Public operators: what they compute, the checks of their arguments, the choice of backend.

Shapes: N rows (states), V vocabulary, D hidden size, S = 2B sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import library
from .checks import (
    check_actions,
    check_frozen,
    check_group,
    check_head,
    check_like,
    check_matrix,
    check_offsets,
    check_rows,
    coefficients,
    denominator,
    finite,
    unit_columns,
    workspace_bytes,
)
from .reference import (
    NO_ACTION,
    Coefficients,
    PolicyStatistics,
    accumulation_dtype,
    minus_infinity,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SoftValue(NamedTuple):
    """Per row, float32 (float64 for float64 inputs), shape [N]."""

    q_action: Tensor
    """q(s, a), the residual Q-value of the action; 0 where the action is -1."""
    value: Tensor
    """V(s), the soft value of the state; -inf where no token is left."""
    base_logprob: Tensor
    """log π(a|s); 0 where the action is -1. No gradient."""
    base_logsumexp: Tensor
    """lse(b). No gradient; a constant of the frozen base, worth caching."""


class BradleyTerry(NamedTuple):
    """Outputs of ``bradley_terry``; differentiable in q_action and value."""

    loss: Tensor
    """preference_loss + chi2_coef·chi2_loss. 0-d."""
    preference_loss: Tensor
    """−mean over pairs of log σ(R_chosen − R_rejected). 0-d."""
    chi2_loss: Tensor
    """Mean over actions of the squared reward, not weighted. 0-d."""
    sequence_rewards: Tensor
    """R as it enters the loss, [2B]: chosen first, then rejected."""
    token_rewards: Tensor
    """r of each action, [N]."""


@overload
def soft_value(
    adapter_logits: Tensor, base_logits: Tensor | None, actions: Tensor, *,
    alpha_0: float, alpha_tilde: float = 1.0, adapter_coef: float = 1.0, base_coef: float = 0.0,
    base_action_logit: Tensor | None = None, base_logsumexp: Tensor | None = None,
    row_mask: Tensor | None = None, return_statistics: Literal[False] = False,
    inplace_backward: bool = False, backend: str | None = None,
) -> SoftValue: ...
@overload
def soft_value(
    adapter_logits: Tensor, base_logits: Tensor | None, actions: Tensor, *,
    alpha_0: float, alpha_tilde: float = 1.0, adapter_coef: float = 1.0, base_coef: float = 0.0,
    base_action_logit: Tensor | None = None, base_logsumexp: Tensor | None = None,
    row_mask: Tensor | None = None, return_statistics: Literal[True],
    inplace_backward: bool = False, backend: str | None = None,
) -> tuple[SoftValue, PolicyStatistics]: ...
@overload
def soft_value(
    adapter_logits: Tensor, base_logits: Tensor | None, actions: Tensor, *,
    alpha_0: float, alpha_tilde: float = 1.0, adapter_coef: float = 1.0, base_coef: float = 0.0,
    base_action_logit: Tensor | None = None, base_logsumexp: Tensor | None = None,
    row_mask: Tensor | None = None, return_statistics: bool,
    inplace_backward: bool = False, backend: str | None = None,
) -> SoftValue | tuple[SoftValue, PolicyStatistics]: ...
def soft_value(
    adapter_logits: Tensor, base_logits: Tensor | None, actions: Tensor, *,
    alpha_0: float, alpha_tilde: float = 1.0, adapter_coef: float = 1.0, base_coef: float = 0.0,
    base_action_logit: Tensor | None = None, base_logsumexp: Tensor | None = None,
    row_mask: Tensor | None = None, return_statistics: bool = False,
    inplace_backward: bool = False, backend: str | None = None,
) -> SoftValue | tuple[SoftValue, PolicyStatistics]:
    """Residual Q-value and soft value from two streams of logits, in one pass over them.

    With q = adapter_coef·a + base_coef·b:

        V = alpha_tilde·lse((q + alpha_0·b) / alpha_tilde) − alpha_0·lse(b)

    (soft value of the customised policy π̃; Q-Adapter §4, design §2). Accumulates in float32.
    The gradient flows to ``adapter_logits`` only and is exact for any upstream gradient.

    Args:
        adapter_logits: a, [N, V], any float dtype, any row stride.
        base_logits: b of the frozen base, same shape, dtype and device. Must not require grad.
            None where ``base_action_logit`` and ``base_logsumexp`` stand for it.
        actions: token ids [N], integer; -1 where a state has no action.
        alpha_0: weight of the base policy (λ·α₁).
        alpha_tilde: entropy weight of the customised policy, > 0.
        adapter_coef, base_coef: q as a linear combination of the streams. (1, 0): the adapted
            stream is q. (alpha_tilde, −alpha_0): the adapted stream is the policy's logits.
        base_action_logit: b[action] [N], float32. With ``base_logsumexp`` it is all of the base
            that is needed where its logits have no weight in the policy: base_coef = −alpha_0, the
            policy parametrization at the α's it was trained with. What stands where there is no
            action does not matter.
        base_logsumexp: lse(b) [N], if known: the base is then read only where its weight is not 0.
        row_mask: bool [N]; rows that are False are skipped: outputs and gradient are 0.
        return_statistics: also return ``PolicyStatistics`` from the same pass.
        inplace_backward: write the gradient over ``adapter_logits`` (they are gone after
            backward; one backward only).
        backend: "torch", "triton", "cpu" or "cuda"; None takes the best there is.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value; the message names it.
        RuntimeError: a forced backend can't serve these tensors.
    """
    coef = coefficients(alpha_0, alpha_tilde, adapter_coef, base_coef)
    check_matrix("adapter_logits", adapter_logits)
    if base_logits is None or base_action_logit is not None:
        b_N, lse_N = _cached_base("base_logits", base_logits, base_action_logit, base_logsumexp,
                                  return_statistics, coef, adapter_logits)
        alone = soft_value(
            adapter_logits, adapter_logits.detach(), actions, alpha_0=0.0,
            alpha_tilde=coef.alpha_tilde, adapter_coef=coef.adapter_coef, base_logsumexp=lse_N,
            row_mask=row_mask, inplace_backward=inplace_backward, backend=backend,
        )
        return _with_cached_base(alone, actions, row_mask, b_N, lse_N, coef)
    check_like("base_logits", base_logits, "adapter_logits", adapter_logits)
    check_frozen("base_logits", base_logits)
    num_rows, vocab_size = adapter_logits.shape
    actions = check_actions(actions, num_rows, vocab_size, adapter_logits.device, row_mask)
    check_rows("base_logsumexp", base_logsumexp, num_rows, adapter_logits.device)
    if base_logsumexp is not None:
        base_logsumexp = base_logsumexp.to(accumulation_dtype(adapter_logits.dtype)).contiguous()
    if inplace_backward and adapter_logits.is_leaf and adapter_logits.requires_grad:
        raise ValueError("inplace_backward would overwrite a leaf: adapter_logits is an input")
    *outputs, _, stats = library.soft_value(
        unit_columns(adapter_logits), unit_columns(base_logits), actions, base_logsumexp,
        *coef, return_statistics, inplace_backward, backend or "",
    )
    result = SoftValue(*outputs)
    return (result, PolicyStatistics(*stats.unbind())) if return_statistics else result


@overload
def linear_soft_value(
    adapter_hidden: Tensor, base_hidden: Tensor | None, weight: Tensor, actions: Tensor, *,
    alpha_0: float, alpha_tilde: float = 1.0, adapter_coef: float = 1.0, base_coef: float = 0.0,
    bias: Tensor | None = None, logit_scale: float = 1.0, base_action_logit: Tensor | None = None,
    base_logsumexp: Tensor | None = None, row_mask: Tensor | None = None, workspace_mb: int = 512,
    return_statistics: Literal[False] = False, backend: str | None = None,
    group: ProcessGroup | None = None, vocab_start: int = 0,
) -> SoftValue: ...
@overload
def linear_soft_value(
    adapter_hidden: Tensor, base_hidden: Tensor | None, weight: Tensor, actions: Tensor, *,
    alpha_0: float, alpha_tilde: float = 1.0, adapter_coef: float = 1.0, base_coef: float = 0.0,
    bias: Tensor | None = None, logit_scale: float = 1.0, base_action_logit: Tensor | None = None,
    base_logsumexp: Tensor | None = None, row_mask: Tensor | None = None, workspace_mb: int = 512,
    return_statistics: Literal[True], backend: str | None = None,
    group: ProcessGroup | None = None, vocab_start: int = 0,
) -> tuple[SoftValue, PolicyStatistics]: ...
@overload
def linear_soft_value(
    adapter_hidden: Tensor, base_hidden: Tensor | None, weight: Tensor, actions: Tensor, *,
    alpha_0: float, alpha_tilde: float = 1.0, adapter_coef: float = 1.0, base_coef: float = 0.0,
    bias: Tensor | None = None, logit_scale: float = 1.0, base_action_logit: Tensor | None = None,
    base_logsumexp: Tensor | None = None, row_mask: Tensor | None = None, workspace_mb: int = 512,
    return_statistics: bool, backend: str | None = None,
    group: ProcessGroup | None = None, vocab_start: int = 0,
) -> SoftValue | tuple[SoftValue, PolicyStatistics]: ...
def linear_soft_value(
    adapter_hidden: Tensor, base_hidden: Tensor | None, weight: Tensor, actions: Tensor, *,
    alpha_0: float, alpha_tilde: float = 1.0, adapter_coef: float = 1.0, base_coef: float = 0.0,
    bias: Tensor | None = None, logit_scale: float = 1.0, base_action_logit: Tensor | None = None,
    base_logsumexp: Tensor | None = None, row_mask: Tensor | None = None, workspace_mb: int = 512,
    return_statistics: bool = False, backend: str | None = None,
    group: ProcessGroup | None = None, vocab_start: int = 0,
) -> SoftValue | tuple[SoftValue, PolicyStatistics]:
    """``soft_value`` straight from hidden states through one frozen head; no [N, V] tensor is held.

    logits = logit_scale·(h·weightᵀ + bias) for both streams. One matrix product with ``weight``
    forward for the policy, one for lse(b) unless it is given, one for the gradient; backward is
    elementwise. Heads that are not linear (Gemma's softcap) need ``soft_value``.

    Args:
        adapter_hidden: h_a [N, D], after the final norm. Gets the gradient.
        base_hidden: h_b [N, D] of the frozen base. Must not require grad. None where
            ``base_action_logit`` and ``base_logsumexp`` stand for it: 8 bytes a state.
        weight: [V, D], the frozen lm_head. Must not require grad.
        actions, alpha_0, alpha_tilde, adapter_coef, base_coef: as in ``soft_value``, but
            ``adapter_coef`` must not be 0.
        base_action_logit, base_logsumexp, backend: as in ``soft_value``.
        bias: [V] or None.
        logit_scale: factor on the logits (Cohere; 1/logits_scaling for Granite).
        row_mask: bool [N]; rows that are False give 0 and get no gradient. They still take part
            in the products: drop them before the call where that matters.
        workspace_mb: upper bound, in MiB, on the memory for logits.
        return_statistics: also return ``PolicyStatistics``. Needs the base's logits, so
            ``base_logsumexp`` must be None.
        group: the processes over which a head too large for one is shared out: ``weight`` and
            ``bias`` are this one's rows [V_r, D] (any number, also none), everything else is the
            same on all of them, and so are the outputs and the gradient. All of them call this, and
            run its backward. Two all-reduces of a few numbers a state, one of [N, D] backward.
        vocab_start: token id of this process's first row.

    Under autocast the products run in the autocast dtype, as F.linear does.

    Raises:
        ValueError, TypeError, RuntimeError: as ``soft_value``.
    """
    coef = coefficients(alpha_0, alpha_tilde, adapter_coef, base_coef)
    if coef.adapter_coef == 0:
        raise ValueError("adapter_coef is 0: the adapted stream would have no part in q")
    check_matrix("adapter_hidden", adapter_hidden)
    if base_hidden is None or base_action_logit is not None:
        b_N, lse_N = _cached_base("base_hidden", base_hidden, base_action_logit, base_logsumexp,
                                  return_statistics, coef, adapter_hidden)
        alone = linear_soft_value(
            adapter_hidden, adapter_hidden.detach(), weight, actions, alpha_0=0.0,
            alpha_tilde=coef.alpha_tilde, adapter_coef=coef.adapter_coef, bias=bias,
            logit_scale=logit_scale, base_logsumexp=lse_N, row_mask=row_mask,
            workspace_mb=workspace_mb, backend=backend, group=group, vocab_start=vocab_start,
        )
        return _with_cached_base(alone, actions, row_mask, b_N, lse_N, coef)
    check_like("base_hidden", base_hidden, "adapter_hidden", adapter_hidden, same_dtype=False)
    check_frozen("base_hidden", base_hidden)
    shard = check_group(group, vocab_start)
    weight, bias = check_head(weight, bias, adapter_hidden, sharded=group is not None)
    if return_statistics and base_logsumexp is not None:
        raise ValueError("return_statistics needs the base's logits: pass base_logsumexp=None")
    num_rows = adapter_hidden.shape[0]
    vocab_size = weight.shape[0] if group is None else None
    actions = check_actions(actions, num_rows, vocab_size, weight.device, row_mask)
    check_rows("base_logsumexp", base_logsumexp, num_rows, weight.device)
    need_grad = torch.is_grad_enabled() and adapter_hidden.requires_grad
    *outputs, _, stats, _ = library.linear_soft_value(
        adapter_hidden, base_hidden, weight, actions, bias, base_logsumexp, *coef,
        finite("logit_scale", logit_scale), workspace_bytes(workspace_mb), return_statistics,
        need_grad, backend or "", *shard,
    )
    result = SoftValue(*outputs)
    return (result, PolicyStatistics(*stats.unbind())) if return_statistics else result


def linear_logsumexp(
    hidden: Tensor, weight: Tensor, actions: Tensor | None = None, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, workspace_mb: int = 512, backend: str | None = None,
    group: ProcessGroup | None = None, vocab_start: int = 0,
) -> Tensor:
    """lse of a head's logits, float32 [N]: the base's constant, computed once and cached.

    Args:
        hidden: [N, D]. No gradient is computed.
        actions: token ids [N] or None. Where given, each action's own logit enters the sum exactly
            instead of rounded to the product's dtype, so that log π(a) = b[a] − lse(b) is never
            positive.
        weight, bias, logit_scale, workspace_mb, backend, group, vocab_start: as in
            ``linear_soft_value``.
    """
    check_matrix("hidden", hidden)
    shard = check_group(group, vocab_start)
    weight, bias = check_head(weight, bias, hidden, sharded=group is not None)
    if actions is None:
        actions = torch.full((hidden.shape[0],), NO_ACTION, device=hidden.device)
    vocab_size = weight.shape[0] if group is None else None
    actions = check_actions(actions, hidden.shape[0], vocab_size, weight.device, None)
    out: Tensor = library.linear_logsumexp(
        hidden.detach(), weight, actions, bias, finite("logit_scale", logit_scale),
        workspace_bytes(workspace_mb), backend or "", *shard,
    )
    return out


def linear_action_logit(
    hidden: Tensor, weight: Tensor, actions: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, group: ProcessGroup | None = None, vocab_start: int = 0,
) -> Tensor:
    """Logit of each row's action, float32 [N]: a gather and a dot, not rounded to the product's
    dtype. Of the base's hidden states it is what ``base_action_logit`` takes. No gradient.

    Args: as ``linear_logsumexp``'s.
    """
    check_matrix("hidden", hidden)
    shard = check_group(group, vocab_start)
    weight, bias = check_head(weight, bias, hidden, sharded=group is not None)
    vocab_size = weight.shape[0] if group is None else None
    actions = check_actions(actions, hidden.shape[0], vocab_size, weight.device, None)
    out: Tensor = library.linear_action_logit(
        hidden.detach(), weight, actions, bias, finite("logit_scale", logit_scale), *shard
    )
    return out


def bradley_terry(
    q_action: Tensor, value: Tensor, sequence_offsets: Tensor, *, gamma: float = 1.0,
    chi2_coef: float = 0.0, bootstrap: Literal["next", "current"] = "next",
    length_normalization: Literal["none", "completion", "padded"] = "none",
    padded_length: int | None = None, num_pairs: float | None = None,
    num_actions: float | None = None, backend: str | None = None,
) -> BradleyTerry:
    """Sequence loss over ragged rows: Bradley–Terry on summed rewards plus a χ² term.

        r_k = q_k − gamma·V_{k+1} (bootstrap "next") or q_k − gamma·V_k ("current"),  R = Σ r_k / d
        loss = −mean_pairs log σ(R_chosen − R_rejected) + chi2_coef·mean_actions r²

    (Q-Adapter's inverse Bellman operator and preference loss; "current" is what the authors'
    utils/q_adapter.py computes.) Differentiable in ``q_action`` and ``value``.

    Args:
        q_action, value: [N], float32 or float64, the actions of all sequences one after the other.
        sequence_offsets: int64 [2B + 1]; sequence i owns rows offsets[i]:offsets[i + 1]. The
            first B are chosen, the last B rejected; pair i is (i, B + i). Sequences may be empty.
        bootstrap: "next" or "current".
        length_normalization: d = 1 ("none"), the sequence's number of actions ("completion"), or
            ``padded_length`` − 1 ("padded").
        num_pairs, num_actions: denominators of the means, where this call sees a part of a larger
            batch; they need not be whole numbers. Default: this call's own. 0 counts as 1.

    Raises:
        ValueError: an option or a shape; the message names it.
    """
    check_rows("q_action", q_action, q_action.shape[0] if q_action.dim() == 1 else -1, None)
    check_rows("value", value, q_action.shape[0], q_action.device)
    if bootstrap not in ("next", "current"):
        raise ValueError(f'bootstrap must be "next" or "current", got {bootstrap!r}')
    if sequence_offsets.is_floating_point():
        raise TypeError(f"sequence_offsets must be integers, got {sequence_offsets.dtype}")
    if sequence_offsets.dim() != 1 or sequence_offsets.shape[0] % 2 == 0:
        raise ValueError(
            "sequence_offsets must hold 2B + 1 numbers (B chosen, then B rejected sequences), "
            f"got shape {tuple(sequence_offsets.shape)}"
        )
    dtype = accumulation_dtype(q_action.dtype)
    q_action, value = q_action.to(dtype).contiguous(), value.to(dtype).contiguous()
    sequence_offsets = sequence_offsets.to(device=q_action.device, dtype=torch.int64)
    lengths = sequence_offsets.diff()
    check_offsets(sequence_offsets, lengths, q_action.shape[0])
    if length_normalization == "none":
        divisors = torch.ones_like(lengths, dtype=dtype)
    elif length_normalization == "completion":
        divisors = lengths.clamp_min(1).to(dtype)
    elif length_normalization == "padded":
        if padded_length is None:
            raise ValueError('length_normalization="padded" needs padded_length')
        divisors = torch.full_like(lengths, max(1, padded_length - 1), dtype=dtype)
    else:
        raise ValueError(
            'length_normalization must be "none", "completion" or "padded", '
            f"got {length_normalization!r}"
        )
    num_pairs, num_actions = (
        x if x is None else denominator(name, float(x))
        for name, x in (("num_pairs", num_pairs), ("num_actions", num_actions))
    )
    losses, sequence_rewards, token_rewards = library.bradley_terry(
        q_action, value, sequence_offsets.contiguous(), divisors, finite("gamma", gamma),
        finite("chi2_coef", chi2_coef), bootstrap == "next", num_pairs, num_actions, backend or "",
    )
    loss, preference_loss, chi2_loss = losses.unbind()
    return BradleyTerry(loss, preference_loss, chi2_loss, sequence_rewards, token_rewards)


# --- a base that is cached ------------------------------------------------------------------


def _with_cached_base(
    alone: SoftValue, actions: Tensor, row_mask: Tensor | None, base_action_logit: Tensor,
    base_logsumexp: Tensor, coef: Coefficients,
) -> SoftValue:
    """What the base adds to q and V where u does not depend on it, two numbers a row, to what the
    adapted stream has alone: c_a·a[action] and α̃·lse(u)."""
    dtype = alone.value.dtype
    b_N, lse_N = base_action_logit.to(dtype), base_logsumexp.to(dtype)
    acts_N, excluded_N = actions >= 0, b_N == -torch.inf
    kept_N = torch.ones_like(acts_N) if row_mask is None else row_mask
    acts_N = acts_N & kept_N
    q_N = alone.q_action
    if coef.base_coef != 0:
        q_N = minus_infinity(excluded_N, q_N + coef.base_coef * b_N, q_N)
    value_N = alone.value
    if coef.alpha_0 != 0:
        value_N = minus_infinity(value_N == -torch.inf, value_N - coef.alpha_0 * lse_N, lse_N)
    return SoftValue(
        q_action=torch.where(acts_N, q_N, 0.0),
        value=torch.where(kept_N, value_N, 0.0),
        base_logprob=torch.where(acts_N, minus_infinity(excluded_N, b_N - lse_N, lse_N), 0.0),
        base_logsumexp=torch.where(kept_N, lse_N, 0.0),
    )


def _cached_base(
    name: str, base: Tensor | None, base_action_logit: Tensor | None,
    base_logsumexp: Tensor | None, statistics: bool, coef: Coefficients, like: Tensor,
) -> tuple[Tensor, Tensor]:
    """b[action] and lse(b), checked."""
    if base is not None:
        raise ValueError(f"give either {name} or base_action_logit and base_logsumexp, not both")
    if base_action_logit is None or base_logsumexp is None:
        raise ValueError(f"without {name}, base_action_logit and base_logsumexp are needed")
    if coef.base_weight != 0:
        raise ValueError(
            f"the base's logits have a weight in the policy (base_coef + alpha_0 = "
            f"{coef.base_weight:g}): base_action_logit is not enough, pass {name}"
        )
    if statistics:
        raise ValueError(f"return_statistics needs the base's logits: pass {name}")
    for number, x in (("base_action_logit", base_action_logit), ("base_logsumexp", base_logsumexp)):
        check_rows(number, x, like.shape[0], like.device)
        check_frozen(number, x)
    return base_action_logit, base_logsumexp
