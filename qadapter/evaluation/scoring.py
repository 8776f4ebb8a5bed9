"""Scores of single states, in float32 from the last hidden states on.

Training runs its products in the base's dtype. Evaluation does not: log-sum-exps of 16-bit logits
bias a KL by some −0.0025 nats. The adapted stream's logits are formed as a = b + W·(h_a − h_b), so
that an adapter that does nothing gives exactly the base: KL 0, equal perplexities, reward 0.

Shapes: N states, D hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.policy.dial import Policy
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.lm_head import LanguageModelHead, trunk
from qadapter.trunk.packing import can_pack, hidden_rows
from qadapter_kernels import Coefficients, SoftValue, soft_value
from qadapter_kernels.reference import accumulation_dtype, weighted_sum


class StateScores(NamedTuple):
    """Per state [N]; float32 (float64 for float64 models) on the model's device."""

    base_logprob: Tensor
    """log π(a|s)."""
    policy_logprob: Tensor
    """log π̃(a|s); log π for a plain model."""
    kl_base_policy: Tensor
    """KL(π‖π̃), nats."""
    kl_policy_base: Tensor
    """KL(π̃‖π), nats."""
    same_top1: Tensor | None
    """Whether a most likely token of π̃ is one of π, bool; None where it was not asked for."""
    soft: SoftValue
    """Under the trained objective, whatever the strength; all zero q and V for a plain model."""


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients; the mode is put back after."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Scorer:
    """Scores states of one model: a ``QAdapterModel``, or any causal LM as a base of its own.

    Args:
        model: call inside ``evaluating(model)``.
        strength: the dial of π̃; default: the policy the model is set to. Rewards do not move
            with it.
        workspace_mb: bound, in MiB, on the memory for logits.

    Raises:
        QAdapterError: the model has no plain linear head.
    """

    def __init__(
        self, model: PreTrainedModel, *, strength: float | None = None, workspace_mb: int = 512
    ):
        self.model = model
        self.customised = isinstance(model, QAdapterModel)
        self.head = model.head if self.customised else LanguageModelHead.of(model)
        self._cast: tuple[tuple, Tensor] | None = None
        self.workspace_bytes = workspace_mb << 20
        self._packed = False
        self.objective = model.objective if self.customised else None
        if not self.customised:
            self.stream_weights = (0.0, 1.0)
        elif strength is None:
            self.stream_weights = model.policy.stream_weights()
        else:
            self.stream_weights = Policy(model.objective, strength).stream_weights()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def weight(self) -> Tensor:
        """The head's [V, D] in ``dtype``; cast once, and again where the model was moved."""
        weight = self.head.weight
        if weight.dtype == self.dtype:
            return weight
        place = weight.data_ptr(), weight.device, weight.dtype
        if self._cast is None or self._cast[0] != place:
            self._cast = place, weight.to(self.dtype)
        return self._cast[1]

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.head.weight.dtype)

    @contextlib.contextmanager
    def packing(self, longest: int) -> Iterator[None]:
        """Inside, ``hidden_streams`` runs no padding, and what texts begin with in common once:
        where the trunk is frozen, nothing remembers it, and its attention can do it.

        Args:
            longest: tokens of the longest text.
        """
        if self.customised and (self.model.adapts_trunk or self.model.trunk_memo is not None):
            yield
            return
        self._packed = can_pack(self._base, longest) is None
        try:
            yield
        finally:
            self._packed = False

    @property
    def _base(self) -> PreTrainedModel:
        return self.model.base if self.customised else self.model

    def hidden_streams(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(h_a, h_b) [B, T, D] after the final norm; a plain model's two are one tensor. What they
        are at padding is not said."""
        if self._packed:
            base_hidden = hidden_rows(self._base, input_ids, attention_mask, packed=True)
            return self.model.adapter(base_hidden) if self.customised else base_hidden, base_hidden
        if self.customised:
            return self.model.hidden_streams(input_ids, attention_mask)
        outputs = trunk(self.model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )
        return outputs.last_hidden_state, outputs.last_hidden_state

    def score(
        self, adapter_hidden: Tensor, base_hidden: Tensor, actions: Tensor, *, top1: bool = False
    ) -> StateScores:
        """Scores N states and the token each is followed by.

        Args:
            adapter_hidden, base_hidden: [N, D]. actions: [N] token ids.
            top1: find out ``same_top1`` too; it reads the logits some more times.
        """
        # Four tensors of a chunk's logits live at once: a, b and what the operators make of them.
        step = max(1, self.workspace_bytes // (4 * self.weight.shape[0] * self.weight.itemsize))
        chunks = [
            self._chunk(adapter_hidden[i : i + step], base_hidden[i : i + step],
                        actions[i : i + step], top1)
            for i in range(0, max(len(actions), 1), step)
        ]
        soft = SoftValue(*(torch.cat(x) for x in zip(*(c.soft for c in chunks), strict=True)))
        columns = zip(*(chunk[:-1] for chunk in chunks), strict=True)
        return StateScores(*(None if x[0] is None else torch.cat(x) for x in columns), soft)

    def logits(self, adapter_hidden: Tensor, base_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(b, z) [N, V]: the base's logits, and the policy's up to a constant a row; alike for
        a plain model. For few states: they are not chunked."""
        a_NV, b_NV = self._logits(adapter_hidden, base_hidden)
        weight_a, weight_b = self.stream_weights
        return b_NV, weighted_sum(weight_a, a_NV, weight_b, b_NV)

    def _chunk(
        self, h_a_RD: Tensor, h_b_RD: Tensor, actions_R: Tensor, top1: bool
    ) -> StateScores:
        a_RV, b_RV = self._logits(h_a_RD, h_b_RD)
        weight_a, weight_b = self.stream_weights
        # π̃ ∝ exp(w_a·a + w_b·b), written as a q on top of log π: log π̃ = q + log π − V.
        soft, statistics = soft_value(
            a_RV, b_RV, actions_R, alpha_0=1.0, alpha_tilde=1.0, adapter_coef=weight_a,
            base_coef=weight_b - 1.0, return_statistics=True,
        )
        base_logprob, policy_logprob = (
            soft.base_logprob, soft.q_action + soft.base_logprob - soft.value
        )
        if self.objective is not None:
            coefficients = self.objective.coefficients
            if coefficients != Coefficients(1.0, 1.0, weight_a, weight_b - 1.0):
                soft = soft_value(
                    a_RV, b_RV, actions_R, **coefficients._asdict(),
                    base_logsumexp=soft.base_logsumexp,
                )
        return StateScores(
            base_logprob=base_logprob,
            policy_logprob=policy_logprob,
            # Not clamped at 0: a mean of rounding errors should stay a mean of rounding errors.
            kl_base_policy=statistics.kl_base_policy,
            kl_policy_base=statistics.kl_policy_base,
            same_top1=(
                _share_top(weighted_sum(weight_a, a_RV, weight_b, b_RV), b_RV) if top1 else None
            ),
            soft=soft,
        )

    def _logits(self, h_a_RD: Tensor, h_b_RD: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight
        h_b_RD = h_b_RD.to(weight)
        products_b = F.linear(h_b_RD, weight)
        if not self.customised:
            b_RV = self._finish(products_b)
            return b_RV, b_RV
        delta_RD = h_a_RD.to(weight) - h_b_RD
        products_a = torch.addmm(products_b, delta_RD, weight.T)
        return self._finish(products_a), self._finish(products_b)

    def _finish(self, products_RV: Tensor) -> Tensor:
        bias = self.head.bias
        logits_RV = products_RV if bias is None else products_RV + bias.to(self.dtype)
        if self.head.logit_scale != 1.0:
            logits_RV = logits_RV * self.head.logit_scale
        if self.head.softcap is not None:
            logits_RV = torch.tanh(logits_RV / self.head.softcap) * self.head.softcap
        return logits_RV


def _share_top(x_RV: Tensor, y_RV: Tensor) -> Tensor:
    """Whether two rows have a largest column in common, [R]. (On a CPU two argmaxes take as long
    as the products; two amaxes do not.)"""
    return ((x_RV == x_RV.amax(-1, True)) & (y_RV == y_RV.amax(-1, True))).any(-1)
