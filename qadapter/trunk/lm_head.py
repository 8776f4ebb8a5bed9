"""The base's lm_head as the kernels see it: logits = cap(logit_scale·(h·Wᵀ + bias))."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadapter.errors import QAdapterError, beginning
from qadapter.trunk.sharding import full, full_weight, layout_of, product_over, rows_of, within

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier_scale")
_DIVISORS = ("logits_scaling",)
"""Config fields by which models scale their logits (Cohere, Falcon-H1, Grok; Granite)."""


@dataclasses.dataclass(frozen=True)
class LanguageModelHead:
    """A frozen head: the base's, wherever it was moved and whatever it was tied to since.

    ``softcap`` (Gemma) is not linear: with it the one-product algebra of design fact 5 does not
    hold, and policies are combined from two tensors of logits.
    """

    base: nn.Module
    """The causal LM whose output embeddings it is."""
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        """[V, D], without gradient; where and in the dtype that the base's now is. Of a sharded
        base it is gathered: ``within`` it."""
        return full_weight(self.base.get_output_embeddings())

    @property
    def bias(self) -> Tensor | None:
        """[V], or None; as ``weight``."""
        bias = getattr(self.base.get_output_embeddings(), "bias", None)
        return None if bias is None else full(bias)

    @property
    def operands(self) -> dict[str, Any]:
        """What ``qadapter_kernels``' linear operators take of it; of a tensor-parallel base this
        process's rows, and with whom it shares the others."""
        shard = rows_of(self.base, self._parameter)
        if shard is None:
            return {"weight": self.weight, "bias": self.bias, "logit_scale": self.logit_scale}
        bias = self.bias
        if bias is not None:
            bias = bias[shard.start : shard.start + len(shard.rows)]
        return {
            "weight": shard.rows, "bias": bias, "logit_scale": self.logit_scale,
            "group": shard.mesh.get_group(), "vocab_start": shard.start,
        }

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @property
    def shape(self) -> torch.Size:
        """(V, D), of the whole."""
        return self._parameter.shape

    @property
    def _parameter(self) -> Tensor:
        return self.base.get_output_embeddings().weight

    @classmethod
    def of(cls, base: nn.Module) -> LanguageModelHead:
        """Reads the head of a causal LM and checks on a few tokens that it is what the model does.

        Raises:
            QAdapterError: the model has no plain linear head, or turns its output into logits in a
                way this class does not describe; its weights are not in memory.
        """
        head_weight(base)
        config = base.config.get_text_config()
        scale = 1.0
        for field in _MULTIPLIERS:
            scale *= getattr(config, field, None) or 1.0
        for field in _DIVISORS:
            scale /= getattr(config, field, None) or 1.0
        head = cls(base, scale, getattr(config, "final_logit_softcapping", None))
        head._check()
        return head

    def __call__(self, hidden: Tensor, bias_weight: float | Tensor = 1.0) -> Tensor:
        """Logits [..., V] of hidden states [..., D], of which ``bias_weight`` is that of the bias:
        how often it is in the sum of streams that they are."""
        hidden = hidden.to(self.device, self.dtype)
        rows = rows_of(self.base, self._parameter)
        if rows is None:
            products = F.linear(hidden, self.weight)
        else:
            products = product_over(rows, hidden, self._parameter)
        return self.finish(products, bias_weight)

    def finish(self, products: Tensor, bias_weight: float | Tensor) -> Tensor:
        """Bias, scale and cap on h·Wᵀ; ``bias_weight`` as for a call."""
        bias = self.bias
        if bias is not None:
            products = products + bias_weight * bias
        if self.logit_scale != 1.0:
            products = products * self.logit_scale
        if self.softcap is not None:
            products = torch.tanh(products / self.softcap) * self.softcap
        return products

    @torch.no_grad()
    def _check(self) -> None:
        base = self.base
        tokens = torch.arange(1, 5, device=input_device(base))[None] % self.shape[0]

        def logits() -> Tensor:
            return self(trunk(base)(input_ids=tokens, use_cache=False).last_hidden_state)

        try:
            ours = within(base, logits).float()
        except RuntimeError as error:
            if (size := layout_of(base).tp_size) == 1:
                raise
            raise QAdapterError(
                f"{type(base).__name__} doesn't run split over {size} processes: "
                f"{beginning(error)}; take a tp_size that divides its heads, those of keys and "
                "values too, or fsdp_size"
            ) from error
        theirs = base(input_ids=tokens, use_cache=False).logits.to(ours.device).float()
        # 16-bit products of the same operands may differ in the last bits kept.
        size = theirs.nan_to_num(0.0, 0.0, 0.0).abs().max()  # a bias of −inf excludes its token
        tolerance = 32 * torch.finfo(self.dtype).eps * size.clamp_min(1.0)
        alike = ours.shape == theirs.shape
        alike = alike and torch.where(ours == theirs, 0.0, ours - theirs).abs().max() <= tolerance
        if not alike:
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


def head_weight(base: nn.Module) -> Tensor:
    """[V, D] of a causal LM.

    Raises:
        QAdapterError: it has none, or it is not in memory.
    """
    name = type(base).__name__
    weight = getattr(base.get_output_embeddings(), "weight", None)
    if weight is None or weight.dim() != 2:
        raise QAdapterError(f"{name} has no linear lm_head: it can't be customised")
    if weight.is_meta:
        raise QAdapterError(
            f"the lm_head of {name} is not in memory (offloaded?): give it a device of its own in "
            'device_map, such as {"lm_head": "cpu", …}, or load the model without one'
        )
    return weight


def input_device(base: nn.Module) -> torch.device:
    """Where a model's token ids belong: at its embeddings, or where accelerate brings them to."""
    embeddings = base.get_input_embeddings()
    brought_to = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if brought_to is None else torch.device(brought_to)
