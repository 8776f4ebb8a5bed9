"""The customised policy as one linear head (design §2, fact 6), computed in float64.

With p_a, p_b the policy's stream weights and h_a = (I + B·A)h, the policy's logits are those of the
head W' = W((p_a + p_b)I + p_a·B·A), with bias (p_a + p_b)·bias and the base's own logit scale.

Shapes: N states, D hidden, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qadapter.trunk.lm_head import LanguageModelHead

_ROWS = 8192
"""Rows of the vocabulary held in float64 at a time."""
_SIGMAS = 8.0
"""A sum of independent rounding errors exceeds 8 of its scale in one of 10¹³ logits (Hoeffding)."""


class LinearPolicy(NamedTuple):
    """A policy of one matrix product: logits = cap(logit_scale·(h·W'ᵀ + weight_sum·bias))."""

    head: LanguageModelHead
    down_RD: Tensor
    """A."""
    up_DR: Tensor
    """B."""
    adapter_weight: float
    """p_a."""
    base_weight: float
    """p_b."""

    @property
    def weight_sum(self) -> float:
        """p_a + p_b = κ/α̃."""
        return self.adapter_weight + self.base_weight

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """W' in float64, a block of rows at a time."""
        up_DR, down_RD = (x.detach().to("cpu", torch.float64) for x in (self.up_DR, self.down_RD))
        for start in range(0, self.head.shape[0], _ROWS):
            block = slice(start, min(start + _ROWS, self.head.shape[0]))
            weight_VD = self.head.weight[block].to("cpu", torch.float64)
            yield block, (
                self.weight_sum * weight_VD + self.adapter_weight * (weight_VD @ up_DR) @ down_RD
            )

    def merged_weight(self) -> Tensor:
        """W' [V, D] in the base's dtype, rounded once."""
        weight = torch.empty_like(self.head.weight, device="cpu")
        for block, rows in self.rows():
            weight[block] = rows.to(weight.dtype)
        return weight

    def merged_bias(self) -> Tensor | None:
        """(p_a + p_b)·bias in the base's dtype."""
        if self.head.bias is None:
            return None
        return (self.weight_sum * self.head.bias.to("cpu", torch.float64)).to(self.head.bias.dtype)

    def lora(self) -> tuple[Tensor, Tensor]:
        """(A [R, D], W·B·p_a/(p_a + p_b) [V, R]), float32: W'/(p_a + p_b) as a LoRA on W."""
        up_DR = self.up_DR.detach().to("cpu", torch.float64) * (
            self.adapter_weight / self.weight_sum
        )
        products = [
            block.to("cpu", torch.float64) @ up_DR for block in self.head.weight.split(_ROWS)
        ]
        return self.down_RD.detach().to("cpu", torch.float32), torch.cat(products).float()

    def exact_logits(self, hidden_ND: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
        """The policy's logits in float64, and how far rounding may take an export from them.

        To first order in u = eps/2: every stored weight is off by at most u·|W'|, and over D
        independent such errors the sum exceeds 8·u·‖h ∘ W'‖₂ with probability below 10⁻¹³; the
        float32 accumulation adds at most D·2⁻²⁴·Σ|h·W'|; bias, scale, cap and the base's own
        product (beside a LoRA) are each rounded once to the base's dtype.

        Args:
            hidden_ND: last hidden states, to the digits that the export computes its logits from.
            stored: dtype the adapted head is stored in.

        Returns:
            (logits, tolerance), both [N, V] float64.
        """
        hidden_ND = hidden_ND.to("cpu", torch.float64)
        u_stored = torch.finfo(stored).eps / 2
        u_computed = torch.finfo(self.head.dtype).eps / 2
        columns, tolerances = [], []
        for block, weight_VD in self.rows():
            products = hidden_ND @ weight_VD.T
            frozen_VD = self.head.weight[block].to("cpu", torch.float64)
            base = self.weight_sum * (hidden_ND @ frozen_VD.T)
            bias = 0.0
            if self.head.bias is not None:
                bias = self.weight_sum * self.head.bias[block].to("cpu", torch.float64)
            scale_of_sum = (hidden_ND.square() @ weight_VD.square().T).sqrt()
            tolerance = (
                _SIGMAS * u_stored * scale_of_sum
                + hidden_ND.shape[1] * 2.0**-24 * (hidden_ND.abs() @ weight_VD.abs().T)
                + 4 * u_computed * (products.abs() + base.abs() + abs(bias))
            )
            columns.append((products + bias) * self.head.logit_scale)
            tolerances.append(tolerance * abs(self.head.logit_scale))
        logits, tolerance = torch.cat(columns, -1), torch.cat(tolerances, -1)
        if self.head.softcap is not None:  # its slope is at most 1
            logits = torch.tanh(logits / self.head.softcap) * self.head.softcap
        return logits, tolerance
