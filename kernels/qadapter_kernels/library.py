"""The operators as PyTorch knows them: torch.library ops with fake implementations and autograd.

One op a direction. Everything that depends on hardware happens inside, so ``torch.compile`` sees
one node with known shapes and gives the same bits as eager.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor

from . import dispatch, linear
from .reference import Coefficients, accumulation_dtype
from .shards import Shard

Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])


def _per_row(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[0], dtype=accumulation_dtype(like.dtype))


def _distinct(outputs: Outputs) -> Outputs:
    """An op's outputs may share no memory: unpacked rows of one buffer become their own.

    In inference mode they don't know that they are views, hence the look at the memory.
    """
    distinct = tuple(
        x.clone() if x._is_view() or x.untyped_storage().nbytes() != x.nbytes else x
        for x in outputs
    )
    return cast(Outputs, distinct)


def _grads(
    outputs: tuple[Tensor, Tensor], *grads: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Upstream gradients [N] of q and V, contiguous; one that is missing is 0, and so is that of an
    excluded action: its q is −inf whatever the adapter does."""
    q_action = outputs[0]
    grad_q, grad_v = (
        torch.zeros_like(x) if g is None else g.to(x.dtype).contiguous()
        for x, g in zip(outputs, grads, strict=True)
    )
    return torch.where(q_action == -torch.inf, 0.0, grad_q), grad_v


# --- logits level ---------------------------------------------------------------------------


@torch.library.custom_op("qadapter::soft_value", mutates_args=())
def soft_value(
    adapter_logits: Tensor, base_logits: Tensor, actions: Tensor, base_logsumexp: Tensor | None,
    alpha_0: float, alpha_tilde: float, adapter_coef: float, base_coef: float,
    statistics: bool, inplace_backward: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ q_action, value, base_logprob, base_logsumexp [N], the policy's normalizer [2, N]
    (``reference.DefinitionOutput``), statistics [3, N] or [0]."""
    coef = Coefficients(alpha_0, alpha_tilde, adapter_coef, base_coef)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    outputs = dispatch.select(adapter_logits, backend).logits_forward(
        adapter_logits, base_logits, actions, coef, base_logsumexp, statistics
    )
    return _distinct(outputs)


@soft_value.register_fake
def _(adapter_logits, base_logits, actions, base_logsumexp, alpha_0, alpha_tilde, adapter_coef,
      base_coef, statistics, inplace_backward, backend):
    rows = _per_row(adapter_logits)
    stats = rows.new_empty((3, rows.shape[0]) if statistics else (0,))
    normalizer = rows.new_empty((2, rows.shape[0]))
    return *(torch.empty_like(rows) for _ in range(4)), normalizer, stats


@torch.library.custom_op("qadapter::soft_value_backward", mutates_args=())
def soft_value_backward(
    adapter_logits: Tensor, base_logits: Tensor, actions: Tensor, policy_normalizer: Tensor,
    grad_q: Tensor, grad_v: Tensor,
    alpha_0: float, alpha_tilde: float, adapter_coef: float, base_coef: float, backend: str,
) -> Tensor:
    out = torch.empty_like(adapter_logits, memory_format=torch.contiguous_format)
    coef = Coefficients(alpha_0, alpha_tilde, adapter_coef, base_coef)
    dispatch.select(adapter_logits, backend).logits_backward(
        adapter_logits, base_logits, actions, policy_normalizer, grad_q, grad_v, coef, out
    )
    return out


@soft_value_backward.register_fake
def _(adapter_logits, base_logits, actions, policy_normalizer, grad_q, grad_v, alpha_0,
      alpha_tilde, adapter_coef, base_coef, backend):
    return torch.empty_like(adapter_logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("qadapter::soft_value_backward_", mutates_args={"adapter_logits"})
def soft_value_backward_(
    adapter_logits: Tensor, base_logits: Tensor, actions: Tensor, policy_normalizer: Tensor,
    grad_q: Tensor, grad_v: Tensor,
    alpha_0: float, alpha_tilde: float, adapter_coef: float, base_coef: float, backend: str,
) -> None:
    """The gradient written over the adapter's logits: no second [N, V] tensor."""
    coef = Coefficients(alpha_0, alpha_tilde, adapter_coef, base_coef)
    dispatch.select(adapter_logits, backend).logits_backward(
        adapter_logits, base_logits, actions, policy_normalizer, grad_q, grad_v, coef,
        adapter_logits,
    )


def _soft_value_setup(ctx, inputs, output):
    adapter_logits, base_logits, actions, _, *coef, _, inplace, backend = inputs
    ctx.save_for_backward(adapter_logits.detach(), base_logits, actions, output[4], *output[:2])
    ctx.coef, ctx.inplace, ctx.backend = coef, inplace, backend
    ctx.spent = False
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _soft_value_backward(ctx, grad_q, grad_v, *_):
    none = (None,) * 10
    if grad_q is None and grad_v is None:
        return None, *none
    if ctx.spent:
        raise RuntimeError(
            "soft_value(inplace_backward=True) wrote its gradient over adapter_logits: "
            "a second backward pass needs inplace_backward=False"
        )
    *saved, q_action, value = ctx.saved_tensors
    grads = _grads((q_action, value), grad_q, grad_v)
    arguments = (*saved, *grads, *ctx.coef, ctx.backend)
    if not ctx.inplace:
        return soft_value_backward(*arguments), *none
    ctx.spent = True
    soft_value_backward_(*arguments)
    return saved[0], *none


soft_value.register_autograd(_soft_value_backward, setup_context=_soft_value_setup)


# --- hidden level ---------------------------------------------------------------------------


@torch.library.custom_op("qadapter::linear_soft_value", mutates_args=())
def linear_soft_value(
    adapter_hidden: Tensor, base_hidden: Tensor, weight: Tensor, actions: Tensor,
    bias: Tensor | None, base_logsumexp: Tensor | None,
    alpha_0: float, alpha_tilde: float, adapter_coef: float, base_coef: float,
    logit_scale: float, workspace_bytes: int, statistics: bool, need_grad: bool, backend: str,
    group: str, vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ q_action, value, base_logprob, base_logsumexp [N], G′ [N, D] or [0, D], statistics, log
    shares [N] or [0]. ``group``: a process group's name, or "" for a head that is whole."""
    with torch.autocast(weight.device.type, enabled=False):
        return _distinct(
            linear.forward(
                adapter_hidden, base_hidden, linear.Head(weight, bias, logit_scale), actions,
                base_logsumexp, Coefficients(alpha_0, alpha_tilde, adapter_coef, base_coef),
                workspace_bytes, statistics, need_grad, dispatch.select(weight, backend),
                Shard.of(group, vocab_start, weight),
            )
        )


@linear_soft_value.register_fake
def _(adapter_hidden, base_hidden, weight, actions, bias, base_logsumexp, alpha_0, alpha_tilde,
      adapter_coef, base_coef, logit_scale, workspace_bytes, statistics, need_grad, backend, group,
      vocab_start):
    rows = _per_row(adapter_hidden)
    product = weight.new_empty((rows.shape[0] if need_grad else 0, weight.shape[1]))
    stats = rows.new_empty((3, rows.shape[0]) if statistics else (0,))
    shares = rows.new_empty(rows.shape[0] if group else 0)
    return *(torch.empty_like(rows) for _ in range(4)), product, stats, shares


@torch.library.custom_op("qadapter::linear_soft_value_backward", mutates_args=())
def linear_soft_value_backward(
    residual_product: Tensor, weight: Tensor, actions: Tensor, grad_q: Tensor, grad_v: Tensor,
    log_shares: Tensor, factor: float, dtype: torch.dtype, group: str, vocab_start: int,
) -> Tensor:
    shard = Shard.of(group, vocab_start, weight)
    return linear.backward(
        residual_product, weight, actions, grad_q, grad_v, factor, dtype, shard, log_shares
    )


@linear_soft_value_backward.register_fake
def _(residual_product, weight, actions, grad_q, grad_v, log_shares, factor, dtype, group,
      vocab_start):
    return residual_product.new_empty(residual_product.shape, dtype=dtype)


def _linear_setup(ctx, inputs, output):
    hidden, _, weight, actions, _, _, _, _, adapter_coef, _, logit_scale, *_, group, start = inputs
    ctx.save_for_backward(output[4], weight, actions, *output[:2], output[3], output[6])
    ctx.factor, ctx.dtype, ctx.shard = adapter_coef * logit_scale, hidden.dtype, (group, start)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, grad_q, grad_v, *_):
    none = (None,) * 16
    if grad_q is None and grad_v is None:
        return None, *none
    residual_product, weight, actions, q_action, value, base_lse, log_shares = ctx.saved_tensors
    grad_q, grad_v = _grads((q_action, value), grad_q, grad_v)
    # A state without support; beside an infinite lse(b), V is −inf all the same.
    grads = grad_q, torch.where((value == -torch.inf) & (base_lse != torch.inf), 0.0, grad_v)
    grad_hidden = linear_soft_value_backward(
        residual_product, weight, actions, *grads, log_shares, ctx.factor, ctx.dtype, *ctx.shard
    )
    return grad_hidden, *none


linear_soft_value.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("qadapter::linear_logsumexp", mutates_args=())
def linear_logsumexp(
    hidden: Tensor, weight: Tensor, actions: Tensor, bias: Tensor | None, logit_scale: float,
    workspace_bytes: int, backend: str, group: str, vocab_start: int,
) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        head = linear.Head(weight, bias, logit_scale)
        row_work = dispatch.select(weight, backend)
        shard = Shard.of(group, vocab_start, weight)
        return linear.logsumexp(hidden, head, actions, workspace_bytes, row_work, shard)


@linear_logsumexp.register_fake
def _(hidden, weight, actions, bias, logit_scale, workspace_bytes, backend, group, vocab_start):
    return _per_row(hidden)


@torch.library.custom_op("qadapter::linear_action_logit", mutates_args=())
def linear_action_logit(
    hidden: Tensor, weight: Tensor, actions: Tensor, bias: Tensor | None, logit_scale: float,
    group: str, vocab_start: int,
) -> Tensor:
    head = linear.Head(weight, bias, logit_scale)
    return linear.action_logits(hidden, head, actions, Shard.of(group, vocab_start, weight))


@linear_action_logit.register_fake
def _(hidden, weight, actions, bias, logit_scale, group, vocab_start):
    return _per_row(hidden)


# --- sequence loss --------------------------------------------------------------------------


@torch.library.custom_op("qadapter::bradley_terry", mutates_args=())
def bradley_terry(
    q_action: Tensor, value: Tensor, sequence_offsets: Tensor, divisors: Tensor,
    gamma: float, chi2_coef: float, bootstrap_next: bool, num_pairs: float | None,
    num_actions: float | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """→ [loss, preference_loss, chi2_loss], sequence rewards [2B], token rewards [N]."""
    outputs: tuple[Tensor, Tensor, Tensor]
    outputs = dispatch.select(q_action, backend).bradley_terry_forward(
        q_action, value, sequence_offsets, divisors, gamma, chi2_coef, bootstrap_next,
        *_inverse_denominators(num_pairs, num_actions, divisors, q_action),
    )
    return _distinct(outputs)


def _inverse_denominators(
    num_pairs: float | None, num_actions: float | None, per_sequence: Tensor, per_action: Tensor
) -> tuple[float, float]:
    """None is this call's own number. It is taken from the shapes in here: as a float argument it
    would make torch.compile recompile for every length. Nothing to average over counts as 1."""
    pairs = per_sequence.shape[0] // 2 if num_pairs is None else num_pairs
    actions = per_action.shape[0] if num_actions is None else num_actions
    return 1.0 / (pairs or 1.0), 1.0 / (actions or 1.0)


@bradley_terry.register_fake
def _(q_action, value, sequence_offsets, divisors, gamma, chi2_coef, bootstrap_next, num_pairs,
      num_actions, backend):
    return q_action.new_empty(3), torch.empty_like(divisors), torch.empty_like(q_action)


@torch.library.custom_op("qadapter::bradley_terry_backward", mutates_args=())
def bradley_terry_backward(
    token_rewards: Tensor, sequence_rewards: Tensor, sequence_offsets: Tensor, divisors: Tensor,
    gamma: float, chi2_coef: float, bootstrap_next: bool, num_pairs: float | None,
    num_actions: float | None, grad_losses: Tensor, grad_sequence: Tensor, grad_tokens: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor]
    outputs = dispatch.select(token_rewards, backend).bradley_terry_backward(
        token_rewards, sequence_rewards, sequence_offsets, divisors, gamma, chi2_coef,
        bootstrap_next,
        *_inverse_denominators(num_pairs, num_actions, divisors, token_rewards),
        grad_losses, grad_sequence, grad_tokens,
    )
    return _distinct(outputs)


@bradley_terry_backward.register_fake
def _(token_rewards, sequence_rewards, sequence_offsets, divisors, gamma, chi2_coef,
      bootstrap_next, num_pairs, num_actions, grad_losses, grad_sequence, grad_tokens, backend):
    return torch.empty_like(token_rewards), torch.empty_like(token_rewards)


def _bradley_terry_setup(ctx, inputs, output):
    _, _, offsets, divisors, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(output[2], output[1], offsets, divisors)


def _bradley_terry_backward(ctx, *grads):
    grads = tuple(g.contiguous() for g in grads)
    grad_q, grad_v = bradley_terry_backward(
        *ctx.saved_tensors, *ctx.options, *grads, ctx.backend
    )
    return grad_q, grad_v, *(None,) * 8


bradley_terry.register_autograd(_bradley_terry_backward, setup_context=_bradley_terry_setup)
