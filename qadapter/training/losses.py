"""One batch to its loss and to the numbers that are logged.

Cached features, packed rows and padded batches meet here as the same thing: N states with an action
each, ragged over 2B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qadapter.objective import find_actions, policy_logprob, sequence_loss
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.sharding import within

PER_PAIR = (
    "preference_loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected",
)
"""Columns averaged over pairs."""
PER_ALL_ACTIONS = ("chi2_loss", "values/mean")
PER_ACTION = (*PER_ALL_ACTIONS, "entropy", "kl_policy_base", "kl_base_policy")
"""Columns summed over a pair's actions and averaged over actions; the last three where the base's
logits were computed anyway."""


class Totals(NamedTuple):
    """Denominators of an optimizer step: all its micro-batches on all processes."""

    pairs: int
    actions: int
    tokens: int


class BatchLoss(NamedTuple):
    loss: Tensor
    """0-d, with gradient."""
    rewards: Tensor
    """R of chosen and rejected, [B, 2]. No gradient."""
    columns: Tensor
    """float32 [B, 1 + C]: number of actions, then ``PER_PAIR`` and ``PER_ACTION`` (as many as
    there are). No gradient."""


def batch_loss(
    model: QAdapterModel, batch: Mapping[str, Any], totals: Totals | None = None, *,
    workspace_mb: int = 512,
) -> BatchLoss:
    """The loss of a collated batch, of cached features or of tokens.

    Args:
        totals: the step this batch is a part of; default: the batch is all there is.
        workspace_mb: upper bound on the memory for logits, MiB.
    """
    return within(model.base, lambda: _batch_loss(model, batch, totals, workspace_mb))


def _batch_loss(
    model: QAdapterModel, batch: Mapping[str, Any], totals: Totals | None, workspace_mb: int
) -> BatchLoss:
    states = _scored_states(model, batch)
    # Without a cached lse(b) the base's logits are computed, and its statistics cost nothing more.
    need_statistics = states.base_logsumexp is None
    outputs = model.soft_value(
        states.adapter_hidden, states.base_hidden, states.tokens,
        base_action_logit=states.base_action_logit, base_logsumexp=states.base_logsumexp,
        workspace_mb=workspace_mb, return_statistics=need_statistics,
    )
    soft, statistics = outputs if need_statistics else (outputs, ())
    offsets, device = states.offsets.to(soft.value.device), batch["rows"].device
    terms = sequence_loss(
        soft, offsets, model.objective, padded_length=states.padded_length,
        num_pairs=totals and totals.pairs, num_actions=totals and totals.actions,
    )
    with torch.no_grad():
        rewards_B2 = terms.sequence_rewards.detach().view(2, -1).t()
        summed = _sum_by_sequence(
            torch.stack(
                [
                    policy_logprob(soft, model.objective), terms.token_rewards.square(),
                    soft.value, *statistics,
                ],
                dim=1,
            ).float(),
            offsets,
        )
        logps_B2 = summed[:, 0].view(2, -1).t()
        margins_B = rewards_B2[:, 0] - rewards_B2[:, 1]
        counts_B = offsets.diff().view(2, -1).sum(0)
        columns = torch.column_stack(
            [
                counts_B, -F.logsigmoid(margins_B), rewards_B2,
                (margins_B.sign() + 1) / 2,  # a tie is half right: an untrained adapter is at 0.5
                margins_B, logps_B2,
                summed[:, 1:].unflatten(0, (2, -1)).sum(0),
            ]
        ).float()
    # Where a device_map splits the base, to the batch's device, which is where trainers sum up.
    # Of views, engines that hook what comes out of a root warn.
    return BatchLoss(terms.loss.to(device).clone(), rewards_B2.to(device), columns.to(device))


class _ScoredStates(NamedTuple):
    """N states, the action taken in each, and what is known of the base there."""

    adapter_hidden: Tensor
    tokens: Tensor
    offsets: Tensor
    padded_length: int
    base_hidden: Tensor | None
    base_action_logit: Tensor | None = None
    base_logsumexp: Tensor | None = None


def _scored_states(model: QAdapterModel, batch: Mapping[str, Any]) -> _ScoredStates:
    if "offsets" not in batch:
        return _padded_states(model, batch)
    features = batch.get("hidden")
    if "packing" in batch and "base_logsumexp" not in batch:
        features = _packed_states(model, batch, base_stream=True)
    if model.adapts_trunk:
        adapted, base = _packed_states(model, batch, entering_ND=batch.get("entering")), features
    else:
        adapted, base = model.adapter.streams(features)
    return _ScoredStates(
        adapted, batch["tokens"], batch["offsets"], batch["padded_length"], base,
        batch.get("base_action_logit"), batch.get("base_logsumexp"),
    )


def _packed_states(model: QAdapterModel, batch: Mapping[str, Any], **stream: Any) -> Tensor:
    hidden_MD = model.packed_hidden(batch["packing"], packed=batch["packed"], **stream)
    return hidden_MD[batch["states"].to(hidden_MD.device)]


def _padded_states(model: QAdapterModel, batch: Mapping[str, Any]) -> _ScoredStates:
    device = model.head.device
    actions = find_actions(
        batch["input_ids"].to(device), batch["completion_mask"].to(device),
        model.objective.mask_alignment,
    )
    streams = model.hidden_streams(batch["input_ids"], batch["attention_mask"])
    adapted, base = (h[actions.sequence_N, actions.state_N] for h in streams)
    return _ScoredStates(adapted, actions.token_N, actions.offsets_S1, actions.shape[1], base)


def count(batch: Mapping[str, Any], mask_alignment: str) -> tuple[int, Tensor, Tensor | int]:
    """Pairs, actions and tokens of a collated batch; on a device no number leaves it."""
    if "offsets" in batch:
        return len(batch["rows"]), batch["offsets"][-1], batch["num_tokens"]
    mask = batch["completion_mask"]
    scored = mask[:, 1:] if mask_alignment == "action" else mask[:, :-1]
    return mask.shape[0] // 2, scored.sum(), batch["attention_mask"].sum()


def averages(columns: Tensor) -> dict[str, float]:
    """Means over the pairs and actions of [P, 1 + C] columns, or of their sum [1 + C] with the
    number of pairs in front, [2 + C]."""
    if columns.dim() == 2:
        columns = torch.cat([columns.new_tensor([len(columns)]), columns.double().sum(0)])
    pairs, actions, *sums = columns.tolist()
    means = {
        name: total / max(pairs, 1)
        for name, total in zip(PER_PAIR, sums[: len(PER_PAIR)], strict=True)
    }
    rest = sums[len(PER_PAIR) :]
    means |= {n: total / max(actions, 1) for n, total in zip(PER_ACTION, rest, strict=False)}
    return means


def _sum_by_sequence(x_NC: Tensor, offsets: Tensor) -> Tensor:
    """[2B, C]. A running total would lose digits on long batches; index_add does not."""
    lengths = offsets.diff()
    sequence_N = torch.arange(len(lengths), device=x_NC.device).repeat_interleave(
        lengths, output_size=len(x_NC)
    )
    return x_NC.new_zeros(len(lengths), x_NC.shape[1]).index_add(0, sequence_N, x_NC)
