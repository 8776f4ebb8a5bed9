"""The base's lm_head as the kernels see it: logits = cap(logit_scale·(h·Wᵀ + bias))."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadapter.errors import QAdapterError

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier_scale")
_DIVISORS = ("logits_scaling",)
"""Config fields by which models scale their logits (Cohere, Falcon-H1, Grok; Granite)."""


@dataclasses.dataclass(frozen=True)
class LanguageModelHead:
    """A frozen head. ``softcap`` (Gemma) is not linear: with it the one-product algebra of design
    fact 5 does not hold, and policies are combined from two tensors of logits."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, base: nn.Module) -> LanguageModelHead:
        """Reads the head of a causal LM and checks on a few tokens that it is what the model does.

        Raises:
            QAdapterError: the model has no plain linear head, or turns its output into logits in a
                way this class does not describe.
        """
        name = type(base).__name__
        module = base.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            raise QAdapterError(f"{name} has no linear lm_head: it can't be customised")
        config = base.config.get_text_config()
        scale = 1.0
        for field in _MULTIPLIERS:
            scale *= getattr(config, field, None) or 1.0
        for field in _DIVISORS:
            scale /= getattr(config, field, None) or 1.0
        head = cls(
            weight=weight.detach(),
            bias=None if getattr(module, "bias", None) is None else module.bias.detach(),
            logit_scale=scale,
            softcap=getattr(config, "final_logit_softcapping", None),
        )
        head._check(base)
        return head

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.finish(F.linear(hidden.to(self.weight.dtype), self.weight), 1.0)

    def finish(self, products: Tensor, bias_weight: float | Tensor) -> Tensor:
        """Bias, scale and cap on h·Wᵀ; ``bias_weight``: how often the bias is in the sum."""
        if self.bias is not None:
            products = products + bias_weight * self.bias
        if self.logit_scale != 1.0:
            products = products * self.logit_scale
        if self.softcap is not None:
            products = torch.tanh(products / self.softcap) * self.softcap
        return products

    def _check(self, base: nn.Module) -> None:
        tokens = torch.arange(1, 5, device=self.weight.device)[None] % self.weight.shape[0]
        with torch.no_grad():
            hidden = trunk(base)(input_ids=tokens, use_cache=False).last_hidden_state
            theirs = base(input_ids=tokens, use_cache=False).logits.float()
        ours = self(hidden).float()
        # 16-bit products of the same operands may differ in the last bits kept.
        tolerance = 32 * torch.finfo(self.weight.dtype).eps * theirs.abs().max().clamp_min(1.0)
        if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= tolerance:
            raise QAdapterError(
                f"{type(base).__name__} turns hidden states into logits in a way that is not "
                "logit_scale·(h·Wᵀ + bias): it can't be customised"
            )


def trunk(base: nn.Module) -> nn.Module:
    """The model below its lm_head, whose ``last_hidden_state`` is taken after the final norm."""
    body = getattr(base, getattr(base, "base_model_prefix", ""), None)
    if body is None or body is base:
        raise QAdapterError(f"{type(base).__name__} is not a causal language model with a head")
    return body
