"""Head adapters: small functions of what the frozen trunk makes of a text.

What an adapter reads of the base are its *features*: the last hidden states h_b, or the states x
that enter the final norm. Both streams are functions of them, h_a by calling the adapter and h_b
by ``base_stream``, and with untrained weights they are the same, so that training begins at the
base policy. LoRA in the trunk comes from PEFT.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadapter.errors import QAdapterError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qadapter.trunk.final_norm import FinalNorm

MAX_RANK = 65_536
"""Wider than any model's hidden states, and room for compositions."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A head adapter.

    Args:
        kind: "head". (LoRA adapters are described by PEFT's own ``LoraConfig``.)
        form: "linear": f(h) = B·A·h, exactly mergeable into lm_head and servable anywhere.
            "block": a gated bottleneck before the trunk's final norm: more expressive, and exactly
            one decoder layer more in a plain checkpoint. "mlp": a gated bottleneck after it, which
            no plain checkpoint can hold.
        rank: width r of the bottleneck, up to ``MAX_RANK``.

    Raises:
        ValueError: an unknown kind or form, a rank below 1 or beyond.
    """

    kind: Literal["head"] = "head"
    form: Literal["linear", "block", "mlp"] = "linear"
    rank: int = 128

    def __post_init__(self) -> None:
        if self.kind != "head":
            raise ValueError(
                f'adapter kind must be "head", got {shown(self.kind)} (for LoRA pass a '
                "peft.LoraConfig)"
            )
        if self.form not in tuple(_FORMS):  # not a dict's: what has no hash is no form either
            raise ValueError(
                f'adapter form must be "linear", "block" or "mlp", got {shown(self.form)}'
            )
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise ValueError(
                f"adapter rank must be a whole number from 1 to {MAX_RANK:,}, got "
                f"{shown(self.rank)}"
            )

    def build(self, hidden_size: int, device: torch.device | None = None) -> HeadAdapter:
        """A fresh adapter with float32 parameters: a learning rate of 1e-3 moves weights by less
        than bfloat16 resolves. One that reads x is still to be put ``on`` a base."""
        return _FORMS[self.form](hidden_size, self.rank, device)

    def build_on(self, base: PreTrainedModel) -> HeadAdapter:
        """The same for a causal LM, on its head's device.

        Raises:
            QAdapterError: the adapter reads the states before the final norm, and the base's trunk
                doesn't end with one.
        """
        weight = base.get_output_embeddings().weight
        adapter = self.build(weight.shape[1], weight.device)
        if adapter.reads_before_norm:
            from qadapter.trunk.final_norm import FinalNorm

            adapter.final_norm = FinalNorm.of(base)
        return adapter


class HeadAdapter(nn.Module):
    """Features [..., D] → h_a [..., D], in the adapter's own dtype (float32) and on its device."""

    reads_before_norm: ClassVar[bool] = False
    """Whether its features are the states x that enter the trunk's final norm; else h_b."""
    final_norm: FinalNorm | None = None
    """That norm, of an adapter that reads before it; the base's own, and no part of the adapter."""

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None = None):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False, device=device, dtype=torch.float32)
        self.up = nn.Linear(rank, hidden_size, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)

    def bottleneck(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.up.weight)
        return features + self.up(self.bottleneck(features))

    def base_stream(self, features: Tensor) -> Tensor:
        """h_b [..., D] of features, as the base computes it."""
        return features

    def streams(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(h_a, h_b) of features."""
        return self(features), self.base_stream(features)


class LinearHeadAdapter(HeadAdapter):
    """h_a = (I + B·A)·h_b; A is ``down``, B is ``up``."""

    def bottleneck(self, features: Tensor) -> Tensor:
        return self.down(features)


class GatedHeadAdapter(HeadAdapter):
    """h_a = h_b + B·(silu(G·h_b) ⊙ A·h_b)."""

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None = None):
        super().__init__(hidden_size, rank, device)
        self.gate = nn.Linear(hidden_size, rank, bias=False, device=device, dtype=torch.float32)

    def bottleneck(self, features: Tensor) -> Tensor:
        return F.silu(self.gate(features)) * self.down(features)


class BlockHeadAdapter(GatedHeadAdapter):
    """h_a = norm(x′) with x′ = x + B·(silu(G·n(x)) ⊙ A·n(x)): the gated MLP of one decoder layer
    more. n is an RMS norm without weights, ``norm`` the trunk's final one.

    What is computed is h_b + (norm(x′) − norm(x)), h_b in the base's dtype and the difference in
    the adapter's, so that untrained weights give h_b to the last bit.
    """

    reads_before_norm = True

    def bottleneck(self, features: Tensor) -> Tensor:
        width = features.shape[-1:]
        return super().bottleneck(F.rms_norm(features, width, eps=self._norm.eps))

    def forward(self, features: Tensor) -> Tensor:
        norm, x = self._norm, features.to(self.up.weight)
        return self.base_stream(features).to(x) + (norm(self.before_norm(x)) - norm(x))

    def before_norm(self, x: Tensor) -> Tensor:
        """x′ [..., D]."""
        return x + self.up(self.bottleneck(x))

    def base_stream(self, features: Tensor) -> Tensor:
        return self._norm(features)

    @property
    def _norm(self) -> FinalNorm:
        if self.final_norm is None:
            raise QAdapterError(
                'an adapter of form "block" computes on a base: make it with build_on'
            )
        return self.final_norm


_FORMS = {"linear": LinearHeadAdapter, "block": BlockHeadAdapter, "mlp": GatedHeadAdapter}
