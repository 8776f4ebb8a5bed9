"""Head adapters: small functions of what the frozen trunk makes of a text.

What an adapter reads of the base are its *features*: the last hidden states h_b, or the states x
that enter the final norm. Both streams are functions of them, h_a by calling the adapter and h_b
by ``base_stream``, and with untrained weights they are the same, so that training begins at the
base policy. LoRA in the trunk comes from PEFT.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadapter.errors import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qadapter.trunk.final_norm import FinalNorm

HeadForm = Literal["linear", "block", "mlp"]
HEAD_FORMS: tuple[HeadForm, ...] = get_args(HeadForm)
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
    form: HeadForm = "linear"
    rank: int = 128

    def __post_init__(self) -> None:
        if self.kind != "head":
            raise ValueError(
                f'adapter kind must be "head", got {shown(self.kind)} (for LoRA pass a '
                "peft.LoraConfig)"
            )
        if self.form not in HEAD_FORMS:
            *others, last = (f'"{form}"' for form in HEAD_FORMS)
            raise ValueError(
                f"adapter form must be {', '.join(others)} or {last}, got {shown(self.form)}"
            )
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise ValueError(
                f"adapter rank must be a whole number from 1 to {MAX_RANK:,}, got "
                f"{shown(self.rank)}"
            )

    def build(self, hidden_size: int, device: torch.device | None = None) -> HeadAdapter:
        """A fresh adapter with float32 parameters: a learning rate of 1e-3 moves weights by less
        than bfloat16 resolves. One that reads x computes once it is ``put_on`` a base."""
        return _FORMS[self.form](hidden_size, self.rank, device)

    def build_on(self, base: PreTrainedModel) -> HeadAdapter:
        """The same for a causal LM, on its head's device.

        Raises:
            QAdapterError: the adapter reads the states before the final norm, and the base's trunk
                doesn't end with one.
        """
        weight = base.get_output_embeddings().weight
        adapter = self.build(weight.shape[1], weight.device)
        adapter.put_on(base)
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

    def put_on(self, base: PreTrainedModel) -> None:
        """Take of a causal LM what the adapter computes with; most need nothing."""

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
    """h_a = norm(x′) with x′ = x + s·B·(silu(G·h_b) ⊙ A·h_b) and h_b = norm(x): what one decoder
    layer more would do to the states x that enter the trunk's final norm.

    What is computed is h_b + (norm(x′) − norm(x)), h_b in the base's dtype and the difference in
    the adapter's, so that untrained weights give h_b to the last bit.
    """

    reads_before_norm = True
    scale: Tensor
    """s, saved with the weights. States are larger before the norm than behind it: by s, so that a
    learning rate means what it means behind."""

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None = None):
        super().__init__(hidden_size, rank, device)
        self.register_buffer("scale", torch.ones((), device=device))

    def put_on(self, base: PreTrainedModel) -> None:
        """Take a causal LM's final norm and its size."""
        from qadapter.trunk.final_norm import FinalNorm

        self.final_norm = FinalNorm.of(base)
        self.scale.fill_(self.final_norm.shrinks_by)

    def forward(self, features: Tensor) -> Tensor:
        x, base_hidden = features.to(self.up.weight), self.base_stream(features).to(self.up.weight)
        moved = self._norm(self.moved(x, base_hidden)) - self._norm(x)
        return base_hidden + moved

    def _norm(self, states: Tensor) -> Tensor:
        if self.final_norm is None:
            raise RuntimeError("an adapter of form block computes once it is put_on a base")
        return self.final_norm(states)

    def moved(self, x: Tensor, base_hidden: Tensor) -> Tensor:
        """x′ [..., D], from x and h_b."""
        return x + self.scale * self.up(self.bottleneck(base_hidden))

    def base_stream(self, features: Tensor) -> Tensor:
        return self._norm(features)


_FORMS: dict[HeadForm, type[HeadAdapter]] = {
    "linear": LinearHeadAdapter, "block": BlockHeadAdapter, "mlp": GatedHeadAdapter,
}
