"""Several head adapters on one base as one: q = Σ wᵢ·qᵢ, exactly.

With κ = c_a + c_b, an adapter's Q-function is q = W·(κ·h + c_a·f(h)). A weighted sum has the
weighted sum of the κ's, and f = Σ (wᵢ·c_aᵢ/c_a)·fᵢ: bottlenecks side by side, the factors in their
outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qadapter.adapters import AdapterConfig
from qadapter.errors import QAdapterError
from qadapter.model import QAdapterModel
from qadapter.objective import ObjectiveConfig


def compose(
    models: Sequence[QAdapterModel], weights: Sequence[float],
    objective: ObjectiveConfig | None = None,
) -> QAdapterModel:
    """One model whose Q-function is Σ wᵢ·qᵢ; it generates, saves and exports like any other.

    Args:
        models: head adapters of one form on the same base; the first one's base is used.
        weights: wᵢ, one for each; negative ones take a preference back.
        objective: gives the α's of the composed policy and its parametrization; default: the
            adapters' own, if they share one.

    Returns:
        A frozen adapter of the ranks' sum.

    Raises:
        QAdapterError: adapters that don't add up to one of their form; the message says why.
    """
    if not models or len(models) != len(weights):
        raise QAdapterError(f"compose needs a weight for each of {len(models)} adapters, "
                            f"got {len(weights)}")
    if not all(math.isfinite(w) for w in weights):
        raise QAdapterError(f"weights must be finite, got {list(weights)}")
    if any(model.adapts_trunk for model in models):
        raise QAdapterError("adapters in the trunk don't add up: compose takes head adapters")
    if models[0].head.softcap is not None:
        raise QAdapterError("logits under a softcap don't add up: this base's adapters can't be "
                            "composed")
    forms = {model.adapter_config.form for model in models}
    if len(forms) > 1:
        names = " and ".join(sorted(forms))
        raise QAdapterError(f"compose needs adapters of one form, got {names}")
    for number, model in enumerate(models[1:], 2):
        model.base_identity.require(models[0].base_identity, f"adapter {number}")
    objective = objective or models[0].objective
    if objective is models[0].objective and any(m.objective != objective for m in models):
        raise QAdapterError("the adapters' objectives differ: pass the objective to compose to")
    _check_kappa(models, weights, objective)
    first = models[0]
    config = AdapterConfig(form=forms.pop(), rank=sum(m.adapter_config.rank for m in models))
    adapter = config.build(first.head.weight.shape[1], first.head.weight.device)
    adapter.load_state_dict(_concatenated(models, weights, objective))
    adapter.requires_grad_(False)
    return QAdapterModel(first.base, adapter, config, objective, first.base_identity).eval()


def _check_kappa(
    models: Sequence[QAdapterModel], weights: Sequence[float], objective: ObjectiveConfig
) -> None:
    parts = [w * _kappa(m.objective) for m, w in zip(models, weights, strict=True)]
    wanted = _kappa(objective)
    if not math.isclose(sum(parts), wanted, rel_tol=1e-9, abs_tol=1e-9 * sum(map(abs, parts))):
        raise QAdapterError(
            f"the weighted adapters hold {sum(parts):g} times the base's logits, the objective "
            f"{wanted:g}: make the weights sum to 1 (any weights do where alpha_0 = alpha_tilde in "
            "the policy parametrization)"
        )


def _kappa(objective: ObjectiveConfig) -> float:
    return objective.adapter_coef + objective.base_coef


def _concatenated(
    models: Sequence[QAdapterModel], weights: Sequence[float], objective: ObjectiveConfig
) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    for model, weight in zip(models, weights, strict=True):
        factor = weight * model.objective.adapter_coef / objective.adapter_coef
        for name, x in model.adapter.state_dict().items():
            pieces.setdefault(name, []).append(factor * x if name == "up.weight" else x)
    # Outputs are [D, rank], all else is [rank, D].
    return {name: torch.cat(xs, dim=int(name == "up.weight")) for name, xs in pieces.items()}
