"""Pair scores from cached features, and how far a policy moved from its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qadapter import QAdapterModel
from qadapter.evaluation.bootstrap import ClusterBootstrap
from qadapter.evaluation.judges.trained import fit_bradley_terry
from qadapter.evaluation.preference import wins
from qadapter.evaluation.scoring import Scorer, evaluating
from qadapter.training import FeatureSet
from qadapter.training.features import FeatureCollator
from qadapter.training.losses import batch_loss

BATCH_PAIRS = 8
KL_STATES = 1500
"""States of each kind of text at which KL and perplexity are measured, drawn once."""
SHORT = 150
"""Most tokens of a pair's longer sequence for it to count as short."""


class PairScores(NamedTuple):
    """One entry a pair, in the data set's order; P pairs, chosen first."""

    rewards: np.ndarray
    """R [P, 2]."""
    logps: np.ndarray
    """Σ log π̃ [P, 2]."""
    tokens: np.ndarray
    """Of the answers [P, 2]."""
    lengths: np.ndarray
    """Tokens of prompt and answer [P, 2]."""

    @property
    def reward_margin(self) -> np.ndarray:
        return self.rewards[:, 0] - self.rewards[:, 1]

    @property
    def logp_margin(self) -> np.ndarray:
        return self.logps[:, 0] - self.logps[:, 1]

    @property
    def mean_logp_margin(self) -> np.ndarray:
        means = self.logps / self.tokens
        return means[:, 0] - means[:, 1]


@torch.no_grad()
def score_pairs(model: QAdapterModel, features: FeatureSet) -> PairScores:
    """Without gradients, from cached features."""
    collate = FeatureCollator()
    outputs = []
    with evaluating(model):
        for start in range(0, len(features), BATCH_PAIRS):
            pairs = [features[i] for i in range(start, min(start + BATCH_PAIRS, len(features)))]
            loss = batch_loss(model, collate(pairs))
            # Columns: number of actions, then losses.PER_PAIR; log-probabilities are its last two.
            outputs.append(torch.cat([loss.rewards, loss.columns[:, 6:8]], dim=1).double())
    rewards, logps = torch.cat(outputs).numpy().reshape(-1, 2, 2).swapaxes(0, 1)
    tokens, lengths = (
        np.array([getattr(features[i], name) for i in range(len(features))])
        for name in ("num_actions", "lengths")
    )
    return PairScores(rewards, logps, tokens, lengths)


def accuracies(scores: PairScores, bootstrap: ClusterBootstrap) -> dict[str, Any]:
    """By reward, also controlled for length, and by the policy's log-probability."""
    right_P = wins(scores.reward_margin)
    longer_P = scores.tokens[:, 0] - scores.tokens[:, 1]
    controlled = bootstrap.mean_of_means(right_P, [longer_P > 0, longer_P < 0])
    short_P = scores.lengths.max(1) <= SHORT
    return (
        bootstrap.mean(right_P).as_dict("accuracy")
        | bootstrap.mean(right_P, short_P).as_dict("accuracy_short")
        | {"short_pairs": int(short_P.sum())}
        | controlled.as_dict("accuracy_length_controlled")
        | {"accuracy_policy_sum": wins(scores.logp_margin).mean(),
           "accuracy_policy_mean": wins(scores.mean_logp_margin).mean()}
    )


def probe_margins(
    training: FeatureSet, prompts: Sequence[str], held_out: FeatureSet
) -> np.ndarray:
    """What a reward model that is no policy makes of the same features: linear on the answers' mean
    hidden states, its penalty chosen by cross-validation over prompts. [P] of ``held_out``."""
    weight_D, _, _ = fit_bradley_terry(_pooled(training), prompts)
    return (_pooled(held_out) @ weight_D).numpy()


def _pooled(features: FeatureSet) -> Tensor:
    """Mean hidden state of the chosen answer less the rejected one's, float64 [P, D]."""
    pairs = (features[i] for i in range(len(features)))
    answers = (pair.hidden.double().split(pair.num_actions) for pair in pairs)
    return torch.stack([chosen.mean(0) - rejected.mean(0) for chosen, rejected in answers])


def draw(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(h_b, the token that follows) at the same random states in every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(tokens), generator=generator)[:KL_STATES]
    return hidden[drawn], tokens[drawn]


def divergence(
    model: QAdapterModel, hidden: Tensor, tokens: Tensor
) -> tuple[float, float, float]:
    """Mean KL(π‖π̃) in nats a token, perplexity of π̃ and of π; float32."""
    with evaluating(model):
        scores = Scorer(model, rewards=False).score(model.adapter(hidden), hidden, tokens)
    return (
        scores.kl_base_policy.double().mean().item(),
        (-scores.policy_logprob.double().mean()).exp().item(),
        (-scores.base_logprob.double().mean()).exp().item(),
    )
