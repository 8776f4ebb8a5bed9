"""The linear adapter nearest to one that is not linear, and what it costs.

Shapes: N states, D hidden, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qadapter.adapters.head_adapter import HeadAdapter
from qadapter.errors import QAdapterError
from qadapter.exporting.head import LinearPolicy
from qadapter.trunk.lm_head import LanguageModelHead, input_device

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel

_RIDGE = 1e-3
"""Of the mean squared feature: directions that the texts hardly show are left alone."""
_HELD_OUT = 4
"""Every fourth text is kept to measure on."""
_STATES = 64
"""States whose logits are held at a time."""


@dataclass(frozen=True)
class Approximation:
    """What replacing the adapter by a linear one changed, on texts it was not fitted to.

    Divergences in nats a token. ``rank`` None: of full rank.
    """

    rank: int | None
    fitted_states: int
    held_out_states: int
    kl_policy_export: float
    """KL(customised policy ‖ export)."""
    kl_policy_base: float
    """KL(customised policy ‖ base) at the same states: what there is to lose."""
    top1_agreement: float
    """Share of states at which both have the same most likely token."""


@torch.no_grad()
def fit_linear(
    model: QAdapterModel, sequences: Sequence[Sequence[int]], rank: int | None
) -> tuple[LinearPolicy, Approximation]:
    """Least squares: the M that minimises Σ ‖W(M·h − f)‖² over the texts' states.

    Args:
        model: with an adapter on the head, h_a = h + f.
        sequences: token ids of texts like those the model is for.
        rank: of M (the best of that rank in the logits' metric); None for full rank, where the
            metric does not matter.

    Raises:
        QAdapterError: fewer than two texts with a token.
    """
    texts = [ids for ids in sequences if len(ids) > 0]
    if len(texts) < 2:
        raise QAdapterError(
            "approximate needs at least two texts: one to fit to, one to measure on"
        )
    held_out = texts[::_HELD_OUT]
    fitted = [ids for i, ids in enumerate(texts) if i % _HELD_OUT]
    size = model.head.shape[1]
    squares_DD = torch.zeros(size, size, dtype=torch.float64)
    products_DD = torch.zeros_like(squares_DD)
    count = 0
    for features_ND in _states(model, fitted):
        h_ND, f_ND = (x.to("cpu", torch.float64) for x in _parts(model.adapter, features_ND))
        squares_DD += h_ND.T @ h_ND
        products_DD += h_ND.T @ f_ND
        count += len(h_ND)
    squares_DD += torch.eye(size, dtype=torch.float64) * (
        _RIDGE * squares_DD.diagonal().mean().clamp_min(1e-30)
    )
    map_DD = torch.linalg.solve(squares_DD, products_DD).T  # M
    if rank is None or rank >= size:
        rank, down_RD, up_DR = None, map_DD, torch.eye(size, dtype=torch.float64)
    else:
        down_RD, up_DR = _reduce_rank(map_DD, squares_DD, model.head.weight, rank)
    policy = LinearPolicy(model.head, down_RD, up_DR, *model.policy.stream_weights())
    return policy, _measure(model, policy, held_out, rank, count)


def _parts(adapter: HeadAdapter, features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """h_b, and what the adapter adds to it: h_a − h_b."""
    adapted_ND, base_ND = adapter.streams(features_ND)
    return base_ND, adapted_ND - base_ND


def _reduce_rank(
    map_DD: Tensor, squares_DD: Tensor, weight_VD: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Reduced-rank regression: (A [R, D], B [D, R]) with B·A nearest to M over the states, errors
    measured after W."""
    gram_DD = torch.zeros_like(map_DD)
    for block in weight_VD.split(8192):
        block = block.to("cpu", torch.float64)
        gram_DD += block.T @ block
    gram_DD.diagonal().add_(1e-12 * gram_DD.diagonal().mean())
    metric_DD = torch.linalg.cholesky(gram_DD).T
    image_DD = metric_DD @ map_DD
    directions_DR = torch.linalg.eigh(image_DD @ squares_DD @ image_DD.T).eigenvectors[:, -rank:]
    up_DR = torch.linalg.solve_triangular(metric_DD, directions_DR, upper=True)
    return directions_DR.T @ image_DD, up_DR


def _measure(
    model: QAdapterModel, policy: LinearPolicy, texts: Sequence[Sequence[int]], rank: int | None,
    fitted_states: int,
) -> Approximation:
    p_a, p_b = model.policy.stream_weights()
    weight = model.head.weight.float()
    down_RD, up_DR = (x.to(weight.device, torch.float32) for x in policy[1:3])
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for features in _states(model, texts):
        for features_ND in features.split(_STATES):
            h_ND, f_ND = (x.float() for x in _parts(model.adapter, features_ND))
            linear_ND = h_ND @ down_RD.T @ up_DR.T
            exact, export, base = (
                _log_probs(model.head, weight, mixed_ND, bias_weight)
                for mixed_ND, bias_weight in (
                    ((p_a + p_b) * h_ND + p_a * f_ND, p_a + p_b),
                    ((p_a + p_b) * h_ND + p_a * linear_ND, p_a + p_b),
                    (h_ND, 1.0),
                )
            )
            sums += torch.stack([
                (exact.exp() * (exact - export)).sum(),
                (exact.exp() * (exact - base)).sum(),
                (exact.argmax(-1) == export.argmax(-1)).sum(),
            ]).cpu().double()
            count += len(h_ND)
    kl_export, kl_base, same = (sums / count).tolist()
    return Approximation(rank, fitted_states, count, kl_export, kl_base, same)


def _log_probs(
    head: LanguageModelHead, weight: Tensor, mixed_ND: Tensor, bias_weight: float
) -> Tensor:
    logits = head.finish(F.linear(mixed_ND, weight), bias_weight)
    return logits.float().log_softmax(-1)


def _states(model: QAdapterModel, texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """What the adapter reads of the base [N, D], a text at a time."""
    for ids in texts:
        yield model.features(torch.tensor([list(ids)], device=input_device(model.base)))[0]
