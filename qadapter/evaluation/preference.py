"""Which answer a model prefers: by implicit reward, by its policy's log-probability, by the base's.

Every accuracy counts a tie as one half, so that a model without a preference scores exactly 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.data import PreferenceCollator, check_pairs
from qadapter.errors import QAdapterError
from qadapter.evaluation.bootstrap import ClusterBootstrap, Estimate
from qadapter.evaluation.scoring import Scorer, evaluating
from qadapter.objective import Actions, find_actions, sequence_loss
from qadapter.policy.model import QAdapterModel
from qadapter_kernels import SoftValue

NUM_BINS = 10
"""Bins of the reliability diagram, equal in width over confidences from 0.5 to 1."""


@dataclass(frozen=True)
class PairScores:
    """One entry a pair, in the dataset's order; NumPy arrays [P] (float64 where not said)."""

    row: np.ndarray
    """Row of the source, int64."""
    prompt_id: np.ndarray
    chosen_tokens: np.ndarray
    """Tokens of the answer, int64."""
    rejected_tokens: np.ndarray
    chosen_base_logp: np.ndarray
    """Σ log π, nats."""
    rejected_base_logp: np.ndarray
    chosen_policy_logp: np.ndarray
    """Σ log π̃; Σ log π for a plain model."""
    rejected_policy_logp: np.ndarray
    chosen_reward: np.ndarray
    """R under the trained objective; NaN for a plain model."""
    rejected_reward: np.ndarray
    kl_base_policy: np.ndarray
    """Sum of KL(π‖π̃) over the states of both answers, nats."""
    kl_policy_base: np.ndarray
    """Sum of KL(π̃‖π) over the states of both answers, nats."""

    def margin(self, name: str, per_token: bool = False) -> np.ndarray:
        """chosen − rejected of "reward", "policy_logp" or "base_logp"; ``per_token``: of their
        means over an answer's tokens."""
        chosen, rejected = getattr(self, f"chosen_{name}"), getattr(self, f"rejected_{name}")
        if per_token:
            chosen, rejected = chosen / self.chosen_tokens, rejected / self.rejected_tokens
        return chosen - rejected


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose Bradley–Terry confidence σ(|margin|) lies in [low, high)."""

    low: float
    high: float
    count: int
    confidence: float | None
    """Mean confidence; None for an empty bin."""
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """How far σ(R_chosen − R_rejected) can be read as a probability."""

    expected_calibration_error: float
    """Σ over bins of share·|accuracy − confidence|. No interval: a resample's is biased upwards."""
    log_loss: Estimate
    """−log σ(margin), nats; log 2 for a model without a preference."""
    brier_score: Estimate
    """(1 − σ(margin))²; 0.25 for a model without a preference."""
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class PreferenceResult:
    """What ``evaluate_preferences`` found. Estimates carry intervals clustered by prompt; what
    needs an adapter is None for a plain model.

    ``preference_accuracy*``: by implicit reward R (no suffix), by the customised policy's
    log-probability (``_policy``), by the base's (``_base``); sums over the answer's tokens, or
    means a token (``_mean``). ``*_length_controlled``: the mean of two accuracies, on pairs whose
    chosen answer is the longer one and on those whose chosen answer is the shorter one, so that
    whatever looks only at which is longer scores 0.5 (pairs of equal length are left out; NaN
    where one group is empty). ``longer_wins``, ``shorter_wins``: what preferring by length alone
    scores; ``random_baseline`` is 0.5.
    """

    num_pairs: int
    num_prompts: int
    preference_accuracy: Estimate | None
    preference_accuracy_mean: Estimate | None
    preference_accuracy_length_controlled: Estimate | None
    preference_accuracy_policy: Estimate | None
    preference_accuracy_policy_mean: Estimate | None
    preference_accuracy_policy_length_controlled: Estimate | None
    preference_accuracy_base: Estimate
    preference_accuracy_base_mean: Estimate
    preference_accuracy_base_length_controlled: Estimate
    reward_margin: Estimate | None
    """Mean R_chosen − R_rejected."""
    policy_margin: Estimate | None
    """Mean Σ log π̃(chosen) − Σ log π̃(rejected), nats."""
    base_margin: Estimate
    """Mean Σ log π(chosen) − Σ log π(rejected), nats."""
    answer_kl_per_token: Estimate | None
    """KL(π‖π̃) at the states of both answers, nats a token: the preference's own states."""
    longer_wins: Estimate
    shorter_wins: Estimate
    random_baseline: float
    share_chosen_longer: float
    calibration: Calibration | None
    pairs: PairScores

    def as_dict(self) -> dict[str, Any]:
        """All but the pairs, as JSON types; intervals under ``<name>_ci``."""
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                flat |= value.as_dict(name)
            elif isinstance(value, int | float):
                flat[name] = value
        if self.calibration is not None:
            flat["expected_calibration_error"] = self.calibration.expected_calibration_error
            flat |= self.calibration.log_loss.as_dict("log_loss")
            flat |= self.calibration.brier_score.as_dict("brier_score")
            flat["reliability_bins"] = [vars(b) for b in self.calibration.bins]
        return flat


def evaluate_preferences(
    model: PreTrainedModel, dataset: Dataset, *, batch_size: int = 8,
    strength: float | None = None, num_resamples: int = 2000, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    base_states: Callable[[int], tuple[Tensor, Tensor]] | None = None,
) -> PreferenceResult:
    """Accuracy, margins and calibration of a model's preferences on held-out pairs.

    Float32 from the last hidden states on; only states of answer tokens meet the head.

    Args:
        model: a ``QAdapterModel``, or a plain causal LM (its log-probabilities count as the base's;
            what needs an adapter is None).
        dataset: from ``tokenize_preferences``.
        batch_size: pairs a batch.
        strength: dial of the policy for its log-probabilities; default: as the model is set.
            Rewards are the trained objective's and do not move with it.
        num_resamples, seed: of the bootstrap over prompts (95% intervals).
        progress: called with (pairs done, pairs in all).
        base_states: ``QAdapterModel.features`` at the actions of a pair's chosen and rejected
            answer, [K, D] each, by its place in the dataset, where training has read them: nothing
            is then read again. For adapters on the head and ``mask_alignment="action"``.

    Raises:
        QAdapterError: an empty dataset; a token that the model does not know; a model without a
            plain linear head.
    """
    if len(dataset) == 0:
        raise QAdapterError("there are no pairs to evaluate on")
    check_pairs(dataset, model)
    with evaluating(model):
        pairs = _score_pairs(model, dataset, batch_size, strength, progress, base_states)
    bootstrap = ClusterBootstrap(pairs.prompt_id, num_resamples=num_resamples, seed=seed)
    lengths = pairs.chosen_tokens - pairs.rejected_tokens
    customised = isinstance(model, QAdapterModel)

    def accuracies(name: str, suffix: str) -> dict[str, Estimate | None]:
        prefix = f"preference_accuracy{suffix}"
        names = (prefix, f"{prefix}_mean", f"{prefix}_length_controlled")
        if not customised and suffix != "_base":
            return dict.fromkeys(names)
        right = wins(pairs.margin(name))
        return dict(zip(names, (
            bootstrap.mean(right),
            bootstrap.mean(wins(pairs.margin(name, per_token=True))),
            bootstrap.mean_of_means(right, [lengths > 0, lengths < 0]),
        ), strict=True))

    reward_margin = pairs.margin("reward")
    tokens = pairs.chosen_tokens + pairs.rejected_tokens
    return PreferenceResult(
        num_pairs=len(lengths),
        num_prompts=bootstrap.num_clusters,
        **accuracies("reward", ""),
        **accuracies("policy_logp", "_policy"),
        **accuracies("base_logp", "_base"),
        reward_margin=bootstrap.mean(reward_margin) if customised else None,
        policy_margin=bootstrap.mean(pairs.margin("policy_logp")) if customised else None,
        base_margin=bootstrap.mean(pairs.margin("base_logp")),
        answer_kl_per_token=(
            bootstrap.mean(pairs.kl_base_policy / tokens, tokens) if customised else None
        ),
        longer_wins=bootstrap.mean(wins(lengths)),
        shorter_wins=bootstrap.mean(wins(-lengths)),
        random_baseline=0.5,
        share_chosen_longer=float((lengths > 0).mean()),
        calibration=_calibrate(reward_margin, bootstrap) if customised else None,
        pairs=pairs,
    )


def wins(margin_P: np.ndarray) -> np.ndarray:
    """1 where the margin is positive, 0.5 where it is 0, NaN where it is none, else 0."""
    return np.where(np.isnan(margin_P), math.nan, np.where(margin_P == 0, 0.5, margin_P > 0))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow


def _calibrate(margin_P: np.ndarray, bootstrap: ClusterBootstrap) -> Calibration:
    # Which of the two is called "chosen" is no outcome to predict: it is always the first. What
    # can be right or wrong is the side the model takes, with confidence σ(|margin|).
    confidence_P = _sigmoid(np.abs(margin_P))
    right_P = wins(margin_P)
    edges = np.linspace(0.5, 1, NUM_BINS + 1).round(6).tolist()
    filled_P = np.nan_to_num((confidence_P - 0.5) * 2 * NUM_BINS, nan=-1)  # NaN: in no bin
    bin_P = np.minimum(filled_P.astype(int), NUM_BINS - 1)
    bins, error = [], 0.0
    for i in range(NUM_BINS):
        inside = bin_P == i
        count = int(inside.sum())
        confidence = float(confidence_P[inside].mean()) if count else None
        accuracy = float(right_P[inside].mean()) if count else None
        bins.append(ReliabilityBin(edges[i], edges[i + 1], count, confidence, accuracy))
        if count:
            error += count / len(margin_P) * abs(accuracy - confidence)
    return Calibration(
        error,
        bootstrap.mean(np.logaddexp(0, -margin_P)),
        bootstrap.mean(_sigmoid(-margin_P) ** 2),
        tuple(bins),
    )


def _score_pairs(
    model: PreTrainedModel, dataset: Dataset, batch_size: int, strength: float | None,
    progress: Callable[[int, int], None] | None,
    base_states: Callable[[int], tuple[Tensor, Tensor]] | None,
) -> PairScores:
    scorer = Scorer(model, strength=strength)
    collate = PreferenceCollator(pad_token_id=0)
    examples = list(dataset)
    order = _together(examples)
    sums = np.empty((6, 2, len(examples)))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([examples[i] for i in indices])
        known = None
        if base_states is not None:
            chosen, rejected = zip(*map(base_states, indices), strict=True)
            known = torch.cat([*chosen, *rejected])
        sums[:, :, indices] = _batch_sums(scorer, batch, known).reshape(6, 2, len(indices))
        if progress is not None:
            progress(start + len(indices), len(order))
    tokens, base_logp, policy_logp, kl_base_policy, kl_policy_base, reward = sums
    return PairScores(
        row=np.array([e.get("row", i) for i, e in enumerate(examples)], dtype=np.int64),
        prompt_id=np.array([e["prompt_id"] for e in examples]),
        chosen_tokens=tokens[0].astype(np.int64), rejected_tokens=tokens[1].astype(np.int64),
        chosen_base_logp=base_logp[0], rejected_base_logp=base_logp[1],
        chosen_policy_logp=policy_logp[0], rejected_policy_logp=policy_logp[1],
        chosen_reward=reward[0], rejected_reward=reward[1],
        kl_base_policy=kl_base_policy.sum(0), kl_policy_base=kl_policy_base.sum(0),
    )


def _batch_sums(
    scorer: Scorer, batch: dict[str, Tensor], base_ND: Tensor | None = None
) -> np.ndarray:
    """Sums over each of the 2B answers, [6, 2B]: tokens, log π, log π̃, both KLs, R.

    Args:
        base_ND: features at the states that are scored, if known.
    """
    input_ids, attention_mask, completion_mask = (
        batch[name].to(scorer.device) for name in ("input_ids", "attention_mask", "completion_mask")
    )
    objective = scorer.objective
    scored = rewarded = find_actions(input_ids, completion_mask, "action")
    if objective is not None and objective.mask_alignment != "action":
        # It may score other positions than an answer's own tokens (the authors' does).
        rewarded = find_actions(input_ids, completion_mask, objective.mask_alignment)
    states_BT = torch.zeros_like(completion_mask, dtype=torch.bool)
    for actions in (scored, rewarded):
        states_BT[actions.sequence_N, actions.state_N] = True
    sequence_N, state_N = rows = states_BT.nonzero(as_tuple=True)
    number_BT = states_BT.flatten().cumsum(0).view_as(states_BT) - 1

    if base_ND is not None:
        streams = scorer.adapted(base_ND.to(scorer.device))
    else:
        streams = (x[rows] for x in scorer.hidden_streams(input_ids, attention_mask))
    scores = scorer.score(*streams, input_ids[sequence_N, state_N + 1])

    def at(actions: Actions, x_N: Tensor) -> Tensor:
        return x_N[number_BT[actions.sequence_N, actions.state_N]]

    sums = [scored.offsets_S1.diff(), *(scored.sum(at(scored, x_N)) for x_N in scores[:4])]
    if objective is None:
        sums.append(torch.full_like(sums[1], math.nan))
    else:
        soft = SoftValue(*(at(rewarded, x_N) for x_N in scores.soft))
        rewards = sequence_loss(
            soft, rewarded.offsets_S1, objective, padded_length=input_ids.shape[1]
        )
        sums.append(rewards.sequence_rewards)
    return torch.stack([x.double() for x in sums]).cpu().numpy()


def _together(examples: Sequence[dict[str, Any]]) -> list[int]:
    """Pairs of one prompt, which is then read once, beside each other; prompts of like length too:
    less padding where there is any."""
    names = [example["prompt_id"] for example in examples]
    first: dict[Any, int] = {}
    longest: dict[Any, int] = {}
    for i, (name, example) in enumerate(zip(names, examples, strict=True)):
        first.setdefault(name, i)
        longest[name] = max(longest.get(name, 0), _length(example))
    return sorted(range(len(names)), key=lambda i: (-longest[names[i]], first[names[i]]))


def _length(example: dict[str, Any]) -> int:
    return len(example["prompt_ids"]) + max(
        len(example["chosen_ids"]), len(example["rejected_ids"])
    )
