"""Several adapters on one base as one: q = Σ wᵢ·qᵢ, exactly; each can be switched per request.

Head adapters: with κ = c_a + c_b, an adapter's Q-function is q = W·(κ·h + c_a·f(h)). A weighted sum
has the weighted sum of the κ's, and f = Σ (wᵢ·c_aᵢ/c_a)·fᵢ: bottlenecks side by side, the factors
in their outputs.

LoRA in the trunk: every adapter is a stream of its own, and all run in one forward with the base's
where that has a weight. q = W·(Σ wᵢ·c_aᵢ·hᵢ + Σ wᵢ·c_bᵢ·h_b): one product with the head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qadapter.adapters.head_adapter import AdapterConfig, HeadAdapter
from qadapter.adapters.lora import LoraAdapter
from qadapter.adapters.streams import BASE
from qadapter.errors import QAdapterError
from qadapter.objective import ObjectiveConfig
from qadapter.policy import storage
from qadapter.policy.adapter_files import AdapterFiles
from qadapter.policy.dial import ComposedPolicy
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.identity import BaseIdentity
from qadapter.trunk.loading import LoadedBase
from qadapter.trunk.sharding import entering, require_whole
from qadapter_kernels.reference import accumulation_dtype


class Part(NamedTuple):
    """One of the adapters of a composition."""

    config: Any
    """``AdapterConfig``, or PEFT's."""
    objective: ObjectiveConfig
    """What it was trained with."""
    weights: dict[str, Tensor]


class ComposedModel(QAdapterModel):
    """A frozen composition; made by ``compose`` or ``QAdapterModel.from_pretrained``.

    It is used like any other model. Beyond that, ``forward`` and ``generate`` take a strength
    [B, n]: a dial of each adapter for every row of a batch, π^(1−Σsᵢ)·Π π̃ᵢ^sᵢ. A row of zeros is
    the base, a single 1 the policy of that adapter alone; with α₀ = α̃ a row is Σ sᵢ·qᵢ.

    Attributes: ``parts``, ``weights``; ``adapter_config``: of the adapters in the trunk, a tuple.
    """

    def __init__(
        self, base: nn.Module, adapter: HeadAdapter | LoraAdapter, adapter_config: Any,
        objective: ObjectiveConfig, base_identity: BaseIdentity, parts: Sequence[Part],
        weights: Sequence[float],
    ):
        super().__init__(base, adapter, adapter_config, objective, base_identity)
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.policy = ComposedPolicy(
            objective, parts=tuple(part.objective for part in parts), weights=self.weights
        )
        self.heads = nn.ModuleList()
        if not self.adapts_trunk:
            for part in parts:
                head = part.config.build_on(base)
                head.load_state_dict(part.weights)
                self.heads.append(head)
        self.requires_grad_(False)
        self.adapter.requires_grad_(False)
        self.eval()

    @entering
    def head_logits(self, features: Tensor, strength: float | Tensor | None = None) -> Tensor:
        """As in ``QAdapterModel``; strength may be [B, n]."""
        if not (isinstance(strength, Tensor) and strength.dim() == 2):
            return super().head_logits(features, strength)
        hidden = [*(head(features) for head in self.heads), self.base_stream(features)]
        return self._mix(self.policy.trunk_weights(strength), hidden)

    @entering
    def hidden_streams(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h_a, h_b), each [B, T, D], with Σ wᵢ·qᵢ = W·(c_a·h_a + c_b·h_b)."""
        if not self.adapts_trunk:
            return super().hidden_streams(input_ids, attention_mask)
        # The weights of a policy that is q itself: α₀ = 0, α̃ = 1.
        q_only = ComposedPolicy(self.objective, 1.0, 0.0, 1.0, self.policy.parts, self.weights)
        *weights, base_weight = q_only.trunk_weights()
        streams = self._trunk_streams((BASE, *range(len(weights))), input_ids, attention_mask)
        base_hidden = next(streams)
        exact = accumulation_dtype(base_hidden.dtype)
        total = (base_weight - self.objective.base_coef) * base_hidden.to(exact)
        for weight, hidden in zip(weights, streams, strict=True):
            total += weight * hidden
        return total / self.objective.adapter_coef, base_hidden

    def adapter_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """h_a of ``hidden_streams``."""
        return self.hidden_streams(input_ids, attention_mask)[0]

    def described(self) -> dict[str, Any]:
        """Its parts' weights in place of one adapter."""
        if not self.adapts_trunk:
            return super().described()
        return {"kind": "composition", "adapters": len(self.parts), "weights": list(self.weights),
                **dataclasses.asdict(self.objective)}

    def _write(self, folder: str | Path, state_dict: dict[str, Tensor] | None) -> None:
        """Head adapters: the one adapter that they are together. LoRA: every adapter in a folder of
        its own, which loads by itself too, and the weights in ``qadapter_config.json``."""
        if not self.adapts_trunk:
            return super()._write(folder, state_dict)
        if state_dict is not None:
            raise QAdapterError("a composition is frozen: it saves no other weights than its own")
        storage.write_composition(
            folder, self.parts, self.weights, self.objective, self.base_identity,
            self.chat_template,
        )


def compose(
    models: Sequence[QAdapterModel], weights: Sequence[float],
    objective: ObjectiveConfig | None = None,
) -> ComposedModel:
    """One model whose Q-function is Σ wᵢ·qᵢ; it generates and saves like any other, and one of head
    adapters exports like them.

    Args:
        models: adapters on the same base, all of one form; the first one's base is shared, and the
            models stay as they are.
        weights: wᵢ, one for each; negative ones take a preference back.
        objective: gives the α's of the composed policy and its parametrization; default: the
            adapters' own, if they share one.

    Returns:
        A frozen model. Head adapters become one, of the ranks' sum.

    Raises:
        QAdapterError: adapters that don't add up; the message says why.
    """
    if not models or len(models) != len(weights):
        raise QAdapterError(f"compose needs a weight for each of {len(models)} adapters, "
                            f"got {len(weights)}")
    if any(isinstance(model, ComposedModel) for model in models):
        raise QAdapterError("a composition can't be composed again: compose its adapters")
    for number, model in enumerate(models[1:], 2):
        model.base_identity.require(models[0].base_identity, f"adapter {number}")
    if objective is None and any(m.objective != models[0].objective for m in models):
        raise QAdapterError("the adapters' objectives differ: pass the objective to compose to")
    templates = {m.chat_template for m in models} - {None}
    if len(templates) > 1:
        raise QAdapterError(
            "the adapters were trained with different chat templates, and one prompt has one: set "
            "chat_template of the models alike"
        )
    forms = {"LoRA" if m.adapts_trunk else m.adapter_config.form for m in models}
    if len(forms) > 1:
        names = " and ".join(sorted(forms))
        raise QAdapterError(f"compose needs adapters of one form, got {names}")
    if any(m.reads_before_norm for m in models):
        raise QAdapterError(
            'adapters of form "block" add to the states before the final norm, behind which they '
            'don\'t add up: compose adapters of form "linear" or "mlp", or LoRA'
        )
    parts = [
        Part(m.adapter_config, m.objective,
             {name: x.detach().to("cpu", copy=True) for name, x in m.adapter.state_dict().items()})
        for m in models
    ]
    first, base = models[0], models[0].base
    if first.adapts_trunk:
        require_whole(base, "a composition of LoRA adapters that are loaded")
        base = first.adapter.bare_base()
    loaded = LoadedBase(base, first.base_identity.name, "", "")
    composed = assemble(
        loaded, parts, weights, objective or first.objective, first.base_identity
    )
    composed.chat_template = templates.pop() if templates else None
    return composed


def assemble(
    loaded: LoadedBase, parts: Sequence[Part], weights: Sequence[float],
    objective: ObjectiveConfig, identity: BaseIdentity,
) -> ComposedModel:
    """Compose adapters of one form on a base; see ``compose``."""
    if not all(math.isfinite(w) for w in weights):
        raise QAdapterError(f"weights must be finite, got {list(weights)}")
    single = QAdapterModel.from_base(loaded, parts[0].config, objective)
    if single.head.softcap is not None:
        raise QAdapterError("logits under a softcap don't add up: this base's adapters can't be "
                            "composed")
    if not single.adapts_trunk or single.head.bias is not None:
        _check_kappa(parts, weights, objective)
    adapter = single.adapter
    if single.adapts_trunk:
        config = tuple(part.config for part in parts)
        adapter.load_state_dict(parts[0].weights)
        for part in parts[1:]:
            adapter.add(part.config, part.weights)
    else:
        rank = sum(part.config.rank for part in parts)
        config = AdapterConfig(form=parts[0].config.form, rank=rank)
        adapter = config.build_on(single.base)
        adapter.load_state_dict(_concatenated(parts, weights, objective))
    return ComposedModel(single.base, adapter, config, objective, identity, parts, weights)


def load(
    saved: storage.SavedAdapter, loaded: LoadedBase, identity: BaseIdentity
) -> ComposedModel:
    """A composition as ``save_pretrained`` wrote it.

    Raises:
        QAdapterError: a file damaged, or of another base.
    """
    parts = []
    for folder in saved.adapter.folders:
        files = AdapterFiles(folder)
        part, weights = storage.read(files), storage.read_weights(files)
        if isinstance(part.adapter, (AdapterConfig, storage.Composition)):
            raise QAdapterError(f"{folder}: not an adapter in the trunk: only they are composed so")
        part.require_base(identity, folder)
        storage.require_planned(folder, weights, loaded.model, part.adapter)
        parts.append(Part(part.adapter, part.objective, weights))
    return assemble(loaded, parts, saved.adapter.weights, saved.objective, identity)


def _check_kappa(
    parts: Sequence[Part], weights: Sequence[float], objective: ObjectiveConfig
) -> None:
    held = [w * _kappa(part.objective) for part, w in zip(parts, weights, strict=True)]
    wanted = _kappa(objective)
    if not math.isclose(sum(held), wanted, rel_tol=1e-9, abs_tol=1e-9 * sum(map(abs, held))):
        raise QAdapterError(
            f"the weighted adapters hold {sum(held):g} times the base's logits, the objective "
            f"{wanted:g}: make the weights sum to 1 (any weights do where alpha_0 = alpha_tilde in "
            "the policy parametrization)"
        )


def _kappa(objective: ObjectiveConfig) -> float:
    return objective.adapter_coef + objective.base_coef


def _concatenated(
    parts: Sequence[Part], weights: Sequence[float], objective: ObjectiveConfig
) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    for part, weight in zip(parts, weights, strict=True):
        factor = weight * part.objective.adapter_coef / objective.adapter_coef
        for name, x in part.weights.items():
            pieces.setdefault(name, []).append(factor * x if name == "up.weight" else x)
    # Outputs are [D, rank], all else is [rank, D].
    return {name: torch.cat(xs, dim=int(name == "up.weight")) for name, xs in pieces.items()}
