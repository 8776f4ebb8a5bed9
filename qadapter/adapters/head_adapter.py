"""Head adapters: small functions of the frozen base's last hidden state.

h_a = h_b + f(h_b), with f zero at the start, so that training begins at the base policy.
LoRA in the trunk comes from PEFT.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadapter.errors import shown

MAX_RANK = 65_536
"""Wider than any model's hidden states, and room for compositions."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A head adapter.

    Args:
        kind: "head". (LoRA adapters are described by PEFT's own ``LoraConfig``.)
        form: "linear": f(h) = B·A·h, exactly mergeable into lm_head and servable anywhere.
            "mlp": a gated bottleneck, B·(silu(G·h) ⊙ A·h): more expressive, not mergeable.
        rank: width r of the bottleneck, up to ``MAX_RANK``.

    Raises:
        ValueError: an unknown kind or form, a rank below 1 or beyond.
    """

    kind: Literal["head"] = "head"
    form: Literal["linear", "mlp"] = "linear"
    rank: int = 128

    def __post_init__(self) -> None:
        if self.kind != "head":
            raise ValueError(
                f'adapter kind must be "head", got {shown(self.kind)} (for LoRA pass a '
                "peft.LoraConfig)"
            )
        if self.form not in tuple(_FORMS):  # not a dict's: what has no hash is no form either
            raise ValueError(f'adapter form must be "linear" or "mlp", got {shown(self.form)}')
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise ValueError(
                f"adapter rank must be a whole number from 1 to {MAX_RANK:,}, got "
                f"{shown(self.rank)}"
            )

    def build(self, hidden_size: int, device: torch.device | None = None) -> HeadAdapter:
        """A fresh adapter with float32 parameters: a learning rate of 1e-3 moves weights by less
        than bfloat16 resolves."""
        return _FORMS[self.form](hidden_size, self.rank, device)


class HeadAdapter(nn.Module):
    """h_b [..., D] → h_a [..., D], in the adapter's own dtype (float32) and on its device."""

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None = None):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False, device=device, dtype=torch.float32)
        self.up = nn.Linear(rank, hidden_size, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)

    def bottleneck(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.up.weight)
        return hidden + self.up(self.bottleneck(hidden))


class LinearHeadAdapter(HeadAdapter):
    """h_a = (I + B·A)·h_b; A is ``down``, B is ``up``."""

    def bottleneck(self, hidden: Tensor) -> Tensor:
        return self.down(hidden)


class GatedHeadAdapter(HeadAdapter):
    """h_a = h_b + B·(silu(G·h_b) ⊙ A·h_b)."""

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None = None):
        super().__init__(hidden_size, rank, device)
        self.gate = nn.Linear(hidden_size, rank, bias=False, device=device, dtype=torch.float32)

    def bottleneck(self, hidden: Tensor) -> Tensor:
        return F.silu(self.gate(hidden)) * self.down(hidden)


_FORMS = {"linear": LinearHeadAdapter, "mlp": GatedHeadAdapter}
