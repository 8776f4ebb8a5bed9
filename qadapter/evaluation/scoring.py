"""Scores of single states, in float32 from the last hidden states on.

Training runs its products in the base's dtype. Evaluation does not: log-sum-exps of 16-bit logits
bias a KL by some −0.0025 nats. The adapted stream's logits are formed as a = b + W·(h_a − h_b), so
that an adapter that does nothing gives exactly the base: KL 0, equal perplexities, reward 0.
A state costs its two products (one where the policy is the base and no reward is asked for) and one
pass over them (``qadapter_kernels.linear_state_scores``).

Shapes: N states, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.policy.dial import Policy
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.lm_head import LanguageModelHead, input_device, trunk
from qadapter.trunk.packing import Packing, can_pack, hidden_rows, hidden_states
from qadapter_kernels import StateScores, linear_state_scores
from qadapter_kernels.reference import LogitHead, accumulation_dtype, weighted_sum


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
        rewards: whether scores hold q and V; else they are 0.
        workspace_mb: bound, in MiB, on the memory for logits.

    Raises:
        QAdapterError: the model has no plain linear head.
    """

    def __init__(
        self, model: PreTrainedModel, *, strength: float | None = None, rewards: bool = True,
        workspace_mb: int = 512,
    ):
        self.model = model
        self.customised = isinstance(model, QAdapterModel)
        self.head = model.head if self.customised else LanguageModelHead.of(model)
        self._cast: tuple[tuple, Tensor] | None = None
        self.workspace_mb = workspace_mb
        self.objective = model.objective if self.customised and rewards else None
        if not self.customised:
            self.stream_weights = (0.0, 1.0)
        elif strength is None:
            self.stream_weights = model.policy.stream_weights()
        else:
            self.stream_weights = Policy(model.objective, strength).stream_weights()

    @property
    def device(self) -> torch.device:
        return self.head.device

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
        return accumulation_dtype(self.head.dtype)

    @property
    def is_base(self) -> bool:
        """Whether nothing that is asked depends on an adapted stream."""
        return self.objective is None and self.stream_weights == (0.0, 1.0)

    def hidden_streams(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(h_a, h_b) [B, T, D] after the final norm; one tensor where ``is_base``. What they are at
        padding is not said: it is not run, and what texts begin with in common runs once, where the
        trunk's attention can do that.

        Args:
            input_ids: [B, T]. attention_mask: [B, T], 1 on one stretch of each row.
        """
        model = self.model
        if self._packs(attention_mask):
            return self._packed_streams(input_ids, attention_mask)
        if self.customised and not self.is_base:
            return model.hidden_streams(input_ids, attention_mask)
        if self.customised:
            base_hidden = model.base_hidden(input_ids, attention_mask)
        else:
            base_hidden = trunk(model)(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        return base_hidden, base_hidden

    def _packs(self, attention_mask: Tensor) -> bool:
        base = self.model.base if self.customised else self.model
        if self.customised and self.model.adapts_trunk and len(self.model.adapter.names) > 1:
            return False  # a composition's streams meet in the model
        return can_pack(base, int(attention_mask.sum(1).max())) is None

    def _packed_streams(
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        model, batch = self.model, (input_ids, attention_mask)
        if not self.customised:
            (hidden,) = hidden_rows(lambda x: [hidden_states(model, x, packed=True)], *batch)
            return hidden, hidden
        memo, run = model.trunk_memo, functools.partial(model.packed_hidden, packed=True)
        rows = functools.partial(hidden_rows, device=input_device(model.base))

        def feature_rows(*batch: Tensor) -> Tensor:
            return rows(lambda x: [run(x, base_stream=True)], *batch)[0]

        def both(packing: Packing) -> list[Tensor]:
            """What lies below the adapted blocks is the same in both."""
            base_hidden, entering = model.packed_base(packing, packed=True)
            return [run(packing, entering_ND=entering), base_hidden]

        two_runs = model.adapts_trunk and not self.is_base
        if two_runs and memo is None:
            adapter_hidden, base_hidden = rows(both, *batch)
            return adapter_hidden, base_hidden
        if memo is None:
            features = feature_rows(*batch)
        else:
            features = memo(
                feature_rows, *batch, dtype=model.base.dtype, before_norm=model.reads_before_norm
            )
        if two_runs:
            return rows(lambda x: [run(x)], *batch)[0], features
        return self.adapted(features)

    def adapted(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(h_a, h_b) [..., D] from ``QAdapterModel.features``, of an adapter on the head."""
        if self.is_base:
            base_hidden = self.model.base_stream(features)
            return base_hidden, base_hidden
        return self.model.adapter.streams(features)

    def score(
        self, adapter_hidden: Tensor, base_hidden: Tensor, actions: Tensor
    ) -> StateScores:
        """Scores N states and the token each is followed by.

        Args:
            adapter_hidden, base_hidden: [N, D]. actions: [N] token ids.
        """
        weight, head = self.weight, self.head
        adapter_hidden, base_hidden, actions = (
            x.to(weight.device) for x in (adapter_hidden, base_hidden, actions)
        )
        return linear_state_scores(
            None if self.is_base else adapter_hidden, base_hidden, weight, actions,
            policy_weights=self.stream_weights,
            objective=None if self.objective is None else self.objective.coefficients,
            bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap,
            workspace_mb=self.workspace_mb,
        )

    def logits(self, adapter_hidden: Tensor, base_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(b, z) [N, V]: the base's logits, and the policy's up to a constant a row; alike for
        a plain model. For few states: they are not chunked."""
        weight, bias = self.weight, self.head.bias
        if bias is not None:
            bias = bias.to(self.dtype) * self.head.logit_scale
        head = LogitHead(self.head.logit_scale, bias, self.head.softcap)
        products_NV = F.linear(base_hidden.to(weight), weight)
        b_NV = head(products_NV)
        if not self.customised:
            return b_NV, b_NV
        delta_ND = adapter_hidden.to(weight) - base_hidden.to(weight)
        a_NV = head(torch.addmm(products_NV, delta_ND, weight.T))
        weight_a, weight_b = self.stream_weights
        return b_NV, weighted_sum(weight_a, a_NV, weight_b, b_NV)
