"""The customised policy as the plain causal LM that other libraries train: TRL's trainers take it.

They want a body and a head apart, and score answers through an option they put into a model's
``forward``: ``model(..., labels=..., fused_lm_head=True)`` (TRL 1.16). Without Triton theirs
projects every position, prompts too: an SFT step costs 4 times what it does with ours, which this
class has in its place.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter_kernels import Coefficients

_STREAM = Coefficients(alpha_0=0.0)
"""Coefficients under which value and q_action are a stream's log-sum-exp and its action's logit."""


class PolicyForCausalLM(PreTrainedModel, GenerationMixin):
    """A model's trained policy π̃ = softmax(W·h_a), sharing its parameters: training the one trains
    the other.

    Args:
        customised: its objective's parametrization is "policy" and its head has no softcap.
        reference: the frozen base instead, as a reference model.

    Raises:
        QAdapterError: the adapted stream is not the policy's logits.
    """

    base_model_prefix = "model"
    _is_stateful = False
    _supports_sdpa = True

    def __init__(self, customised: QAdapterModel, reference: bool = False):
        if customised.objective.parametrization != "policy" or customised.head.softcap is not None:
            raise QAdapterError(
                'TRL trains a stream that is the policy: parametrization "policy", no softcap'
            )
        super().__init__(copy.deepcopy(customised.config))
        self.model = _Body(customised, reference)
        self.generation_config = copy.deepcopy(customised.generation_config)
        self.all_tied_weights_keys = {}

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, fused_lm_head: bool = False,
        num_items_in_batch: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast | FusedCausalLMOutput:
        """Logits in float32, of the ``logits_to_keep`` last positions alone where that is not 0;
        or, with ``fused_lm_head``, the log-probabilities [B, T − 1] of ``labels`` alone, with
        gradient. (What TRL logs beside them, entropy and such, is not computed: NaN.)"""
        if not fused_lm_head:
            outputs = self.model.customised(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels,
                strength=float(not self.model.reference), logits_to_keep=logits_to_keep, **kwargs,
            )
            outputs.logits = outputs.logits.float()  # what TRL makes of them is no 16-bit matter
            return outputs
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        targets = labels[:, 1:]
        scored = targets != -100
        hidden_ND = hidden[:, :-1][scored]
        soft = self.model.customised.soft_value(
            hidden_ND, hidden_ND.detach(), targets[scored], _STREAM,
            base_logsumexp=hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32),
        )
        logps_N = soft.q_action - soft.value
        logps = logps_N.new_zeros(scored.shape).masked_scatter(scored, logps_N)
        unknown = torch.full_like(logps, torch.nan).detach()
        count = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-logps.sum() / count, log_probs=logps, entropy=unknown, mean_logits=unknown,
            is_top1=torch.zeros_like(scored), label_mask=scored,
        )

    def train(self, mode: bool = True) -> PolicyForCausalLM:
        super().train(mode)
        self.model.customised.train(mode)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.model.customised.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.customised.get_output_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.model.customised.tie_weights(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to initialise."""


class _Body(nn.Module):
    """Token ids to a stream's last hidden states, in the head's dtype."""

    def __init__(self, customised: QAdapterModel, reference: bool):
        super().__init__()
        self.customised, self.reference = customised, reference

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        model = self.customised
        stream = model.base_hidden if self.reference else model.adapter_hidden
        hidden = stream(input_ids, attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=hidden.to(model.head.dtype))
