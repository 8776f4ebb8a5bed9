"""The objective: rewards from a residual Q-function, Bradley–Terry over sequences, a χ² term.

Ten lines of mathematics (design §2; Q-Adapter, Li et al., ICLR 2025) on top of
``qadapter_kernels``; anybody's training loop can call the two losses here.

Shapes: B pairs; 2B sequences, chosen first; T tokens; V vocabulary; D hidden; N actions in all.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from qadapter_kernels import (
    BradleyTerry,
    Coefficients,
    PolicyStatistics,
    SoftValue,
    bradley_terry,
    linear_soft_value,
    soft_value,
)
from qadapter_kernels.checks import coefficients, finite
from qadapter_kernels.reference import minus_infinity

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHOICES = {
    "parametrization": ("policy", "q"),
    "bootstrap": ("next", "current"),
    "length_normalization": ("none", "completion", "padded"),
    "mask_alignment": ("action", "state"),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is maximised, and how. Frozen and validated; saved with every adapter.

    Args:
        alpha_0: α₀ = λ·α₁, weight of the base policy. ≥ 0.
        alpha_tilde: α̃, entropy weight of the customised policy. > 0.
        gamma: γ, discount. In [0, 1].
        chi2_coef: β, weight of the mean squared reward. ≥ 0. (The authors call it beta; DPO's
            beta is α₀ = α̃ here.)
        parametrization: "policy": the adapted stream is the customised policy's logits,
            q = α̃·a − α₀·b. "q": it is the residual Q-function itself, q = a (the authors' code).
        bootstrap: "next": r = q(s, a) − γ·V(s′), the paper's Bellman equation. "current":
            r = q(s, a) − γ·V(s), what the authors' code computes.
        length_normalization: R is the sum of rewards divided by 1 ("none"), by the number of
            actions ("completion"), or by T − 1 ("padded": the authors' code, depends on padding).
        mask_alignment: "action": every completion token is an action, scored at its own state.
            "state": the outputs at completion tokens are scored, as the authors' code does (skips
            the first completion token, scores one past the end).

    Raises:
        ValueError: a value out of range; the message names the field. α̃ is at least 1e-30, nothing
            is larger than 1e30, and α₀ and q's coefficients are at most 1e30 times α̃.
    """

    alpha_0: float = 1.0
    alpha_tilde: float = 1.0
    gamma: float = 1.0
    chi2_coef: float = 0.1
    parametrization: Literal["policy", "q"] = "policy"
    bootstrap: Literal["next", "current"] = "next"
    length_normalization: Literal["none", "completion", "padded"] = "none"
    mask_alignment: Literal["action", "state"] = "action"

    def __post_init__(self) -> None:
        for name in ("alpha_0", "alpha_tilde", "gamma", "chi2_coef"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"{name} must be a number, got {number!r}")
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {number!r}")
            finite(name, number)  # what the kernels have room for
        if self.alpha_tilde == 0:
            raise ValueError("alpha_tilde must be positive, got 0")
        coefficients(*self.coefficients)
        if self.gamma > 1:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = " or ".join(f'"{choice}"' for choice in choices)
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    @classmethod
    def authors(cls) -> ObjectiveConfig:
        """The authors' published code (utils/q_adapter.py), to the last digit."""
        return cls(
            alpha_0=0.01, alpha_tilde=1.0, gamma=1.0, chi2_coef=0.1, parametrization="q",
            bootstrap="current", length_normalization="padded", mask_alignment="state",
        )

    @property
    def adapter_coef(self) -> float:
        """c_a in q = c_a·a + c_b·b."""
        return self.alpha_tilde if self.parametrization == "policy" else 1.0

    @property
    def base_coef(self) -> float:
        """c_b in q = c_a·a + c_b·b."""
        return -self.alpha_0 if self.parametrization == "policy" else 0.0

    @property
    def coefficients(self) -> Coefficients:
        """What the kernels take, as keyword arguments by ``._asdict()``."""
        return Coefficients(self.alpha_0, self.alpha_tilde, self.adapter_coef, self.base_coef)


class QAdapterLossOutput(NamedTuple):
    """The loss and what it is made of, float32 (float64 for float64 inputs). All but
    ``policy_logps`` and ``base_logps`` carry gradients to the adapted stream."""

    loss: Tensor
    """preference_loss + chi2_coef·chi2_loss, 0-d."""
    preference_loss: Tensor
    """−mean over pairs of log σ(R_chosen − R_rejected), 0-d."""
    chi2_loss: Tensor
    """Mean over actions of r², not weighted, 0-d."""
    chosen_rewards: Tensor
    """R of the chosen as it enters the loss, [B]."""
    rejected_rewards: Tensor
    """R of the rejected, [B]."""
    token_rewards: Tensor
    """r at each action's position, 0 elsewhere, [2B, T]."""
    values: Tensor
    """V of the state an action was taken in, at the action's position, 0 elsewhere, [2B, T]."""
    policy_logps: Tensor
    """Σ log π̃ over a sequence's actions, [2B]."""
    base_logps: Tensor
    """Σ log π, [2B]."""
    statistics: PolicyStatistics | None = None
    """π̃ against π at each action's state [N], if asked for."""


class Actions(NamedTuple):
    """The actions of a padded batch, row after row: N of them in 2B sequences of T positions."""

    sequence_N: Tensor
    state_N: Tensor
    """Position whose output scores the action."""
    position_N: Tensor
    """Position of the action's token; state + 1."""
    token_N: Tensor
    offsets_S1: Tensor
    """int64 [2B + 1]: sequence i owns actions offsets[i]:offsets[i + 1]."""
    shape: tuple[int, int]

    def scatter(self, x_N: Tensor) -> Tensor:
        """[2B, T] with x at the actions' positions and 0 elsewhere."""
        return x_N.new_zeros(self.shape).index_put((self.sequence_N, self.position_N), x_N)

    def sum(self, x_N: Tensor) -> Tensor:
        """Sum over each sequence's actions, [2B]."""
        return x_N.new_zeros(self.shape[0]).index_add(0, self.sequence_N, x_N)


def find_actions(
    input_ids: Tensor, completion_mask: Tensor, mask_alignment: str = "action"
) -> Actions:
    """Actions of a batch. Position 0 has no state before it and can't be an action.

    Args:
        input_ids: [rows, T] integer.
        completion_mask: [rows, T], true at completion tokens (gaps allowed).
        mask_alignment: as in ``ObjectiveConfig``.
    """
    if completion_mask.shape != input_ids.shape:
        raise ValueError(
            f"completion_mask has shape {tuple(completion_mask.shape)}, "
            f"input_ids has {tuple(input_ids.shape)}"
        )
    mask = completion_mask.bool()
    scored = mask[:, 1:] if mask_alignment == "action" else mask[:, :-1]
    sequence_N, state_N = scored.nonzero(as_tuple=True)
    position_N = state_N + 1
    return Actions(
        sequence_N, state_N, position_N, input_ids[sequence_N, position_N],
        torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0)),
        (input_ids.shape[0], input_ids.shape[1]),
    )


def q_adapter_loss(
    adapter_logits: Tensor, base_logits: Tensor | None, input_ids: Tensor, completion_mask: Tensor,
    config: ObjectiveConfig, *, num_pairs: float | None = None, num_actions: float | None = None,
    base_action_logit: Tensor | None = None, base_logsumexp: Tensor | None = None,
    return_statistics: bool = False, backend: str | None = None,
) -> QAdapterLossOutput:
    """Q-Adapter's loss from two streams of logits (any model, softcapped ones too).

    Args:
        adapter_logits: a, [2B, T, V], row i (chosen) and row B + i (rejected) form pair i.
        base_logits: b of the frozen base, same shape; must not require grad. None where the next
            two stand for it: in the policy parametrization.
        input_ids: [2B, T]. completion_mask: [2B, T], true at the tokens that are actions.
        num_pairs, num_actions: denominators of the larger batch this one is a part of, so that
            gradient accumulation and data parallelism change nothing. Default: this batch's own.
        base_action_logit: b[action] [2B, T], standing at the action's state (t for the token at
            t + 1).
        base_logsumexp: lse(b) [2B, T], if known.
        return_statistics: also return entropy and KL per state.
        backend: as in ``qadapter_kernels.soft_value``.

    A batch without any action gives the loss of zero rewards (log 2), connected to the graph.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices; the message names the argument.
    """
    _check_stream("adapter_logits", adapter_logits, input_ids)
    if base_logits is not None:
        _check_stream("base_logits", base_logits, input_ids)
        base_logits = base_logits.flatten(0, 1)
    actions = find_actions(input_ids, completion_mask, config.mask_alignment)
    _check_cached_base(base_action_logit, base_logsumexp, input_ids)
    # The rows that score no action are skipped where they stand: gathering the others would copy
    # both [2B, T, V] tensors.
    rows_N = actions.sequence_N * input_ids.shape[1] + actions.state_N
    scored = torch.zeros(input_ids.numel(), dtype=torch.bool, device=input_ids.device)
    scored[rows_N] = True
    tokens = input_ids.roll(-1, dims=1).flatten()
    outputs = soft_value(
        adapter_logits.flatten(0, 1), base_logits, tokens, **config.coefficients._asdict(),
        base_action_logit=None if base_action_logit is None else base_action_logit.flatten(),
        base_logsumexp=None if base_logsumexp is None else base_logsumexp.flatten(),
        row_mask=scored, return_statistics=return_statistics, backend=backend,
    )
    soft, statistics = _apart(outputs)
    soft = SoftValue(*(x[rows_N] for x in soft))
    if statistics is not None:
        statistics = PolicyStatistics(*(x[rows_N] for x in statistics))
    return _assemble(soft, statistics, actions, config, num_pairs, num_actions, backend)


def linear_q_adapter_loss(
    adapter_hidden: Tensor, base_hidden: Tensor | None, lm_head_weight: Tensor, input_ids: Tensor,
    completion_mask: Tensor, config: ObjectiveConfig, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, num_pairs: float | None = None, num_actions: float | None = None,
    base_action_logit: Tensor | None = None, base_logsumexp: Tensor | None = None,
    workspace_mb: int = 512, return_statistics: bool = False, backend: str | None = None,
    group: ProcessGroup | None = None, vocab_start: int = 0,
) -> QAdapterLossOutput:
    """The same loss from hidden states through a frozen head: no [2B, T, V] tensor is ever held.

    Args:
        adapter_hidden, base_hidden: h_a and h_b after the final norm, [2B, T, D]; h_b None where
            ``base_action_logit`` and ``base_logsumexp`` stand for it.
        lm_head_weight: [V, D], frozen. bias, logit_scale: logits = logit_scale·(h·Wᵀ + bias).
        workspace_mb: upper bound in MiB on the memory for logits.
        group, vocab_start: the processes over which the head is shared out, each with its rows of
            ``lm_head_weight`` and ``bias`` from token id ``vocab_start`` on, and what else is given
            alike on all of them; as in ``qadapter_kernels.linear_soft_value``.

    The rest, and what is raised, as in ``q_adapter_loss``.
    """
    _check_stream("adapter_hidden", adapter_hidden, input_ids)
    actions = find_actions(input_ids, completion_mask, config.mask_alignment)
    if base_hidden is not None:
        _check_stream("base_hidden", base_hidden, input_ids)
        base_hidden = _rows(base_hidden, actions)
    _check_cached_base(base_action_logit, base_logsumexp, input_ids)
    outputs = linear_soft_value(
        _rows(adapter_hidden, actions), base_hidden, lm_head_weight, actions.token_N,
        **config.coefficients._asdict(), bias=bias, logit_scale=logit_scale,
        base_action_logit=None if base_action_logit is None else _rows(base_action_logit, actions),
        base_logsumexp=None if base_logsumexp is None else _rows(base_logsumexp, actions),
        workspace_mb=workspace_mb, return_statistics=return_statistics, backend=backend,
        group=group, vocab_start=vocab_start,
    )
    soft, statistics = _apart(outputs)
    return _assemble(soft, statistics, actions, config, num_pairs, num_actions, backend)


def sequence_loss(
    soft: SoftValue, sequence_offsets: Tensor, config: ObjectiveConfig, *,
    padded_length: int | None = None, num_pairs: float | None = None,
    num_actions: float | None = None, backend: str | None = None,
) -> BradleyTerry:
    """Bradley–Terry and χ² over ragged actions (cached features have no padding)."""
    return bradley_terry(
        soft.q_action, soft.value, sequence_offsets, gamma=config.gamma,
        chi2_coef=config.chi2_coef, bootstrap=config.bootstrap,
        length_normalization=config.length_normalization, padded_length=padded_length,
        num_pairs=num_pairs, num_actions=num_actions, backend=backend,
    )


def policy_logprob(soft: SoftValue, config: ObjectiveConfig) -> Tensor:
    """log π̃(a|s) = (q + α₀·log π − V)/α̃ of each action, [N]; −inf where the token is excluded, or
    every token of the state. No gradient."""
    logit, value = soft.q_action.detach(), soft.value.detach()
    if config.alpha_0 != 0:  # 0·−inf is NaN
        logit = logit + config.alpha_0 * soft.base_logprob
    return minus_infinity(logit == -torch.inf, logit - value, value) / config.alpha_tilde


def _assemble(
    soft: SoftValue, statistics: PolicyStatistics | None, actions: Actions,
    config: ObjectiveConfig, num_pairs: float | None, num_actions: float | None,
    backend: str | None,
) -> QAdapterLossOutput:
    losses = sequence_loss(
        soft, actions.offsets_S1, config, padded_length=actions.shape[1], num_pairs=num_pairs,
        num_actions=num_actions, backend=backend,
    )
    chosen_B, rejected_B = losses.sequence_rewards.tensor_split(2)
    return QAdapterLossOutput(
        loss=losses.loss, preference_loss=losses.preference_loss, chi2_loss=losses.chi2_loss,
        chosen_rewards=chosen_B, rejected_rewards=rejected_B,
        token_rewards=actions.scatter(losses.token_rewards),
        values=actions.scatter(soft.value),
        policy_logps=actions.sum(policy_logprob(soft, config)),
        base_logps=actions.sum(soft.base_logprob),
        statistics=statistics,
    )


def _rows(x: Tensor, actions: Actions) -> Tensor:
    """The rows of a [2B, T, ...] tensor that score an action, [N, ...]. Prompt and padding rows
    cost nothing from here on."""
    return x[actions.sequence_N, actions.state_N]


def _apart(
    outputs: SoftValue | tuple[SoftValue, PolicyStatistics],
) -> tuple[SoftValue, PolicyStatistics | None]:
    return (outputs, None) if isinstance(outputs, SoftValue) else outputs


def _check_cached_base(
    base_action_logit: Tensor | None, base_logsumexp: Tensor | None, input_ids: Tensor
) -> None:
    for name, x in (("base_action_logit", base_action_logit), ("base_logsumexp", base_logsumexp)):
        if x is not None:
            _check_per_token(name, x, input_ids)


def _check_per_token(name: str, x: Tensor, input_ids: Tensor) -> None:
    if x.shape != input_ids.shape:
        raise ValueError(
            f"{name} must have shape {tuple(input_ids.shape)} ([2B, T]), got {tuple(x.shape)}"
        )


def _check_stream(name: str, x: Tensor, input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] % 2:
        raise ValueError(
            "input_ids must have shape [2B, T] (B chosen rows, then B rejected rows), "
            f"got {tuple(input_ids.shape)}"
        )
    if input_ids.is_floating_point():
        raise TypeError(f"input_ids must be integer token ids, got {input_ids.dtype}")
    if x.dim() != 3 or x.shape[:2] != input_ids.shape:
        raise ValueError(
            f"{name} must have shape [{', '.join(map(str, input_ids.shape))}, ...] like input_ids, "
            f"got {tuple(x.shape)}"
        )
