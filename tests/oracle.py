"""Two independent oracles of the loss, in plain NumPy float64.

``objective`` is written from the method's definition (design §2) with a loop over sequences and
actions; it shares no code and no algebra with the library (it goes through log π, z and
V = α̃·lse(z), where the library never forms log π). ``authors_objective`` is what the authors'
published training code computes. Logits must be finite.

Shapes: B pairs, 2B sequences (chosen first), T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Objective(NamedTuple):
    loss: float
    preference_loss: float
    chi2_loss: float
    chosen_rewards: np.ndarray
    rejected_rewards: np.ndarray
    token_rewards: np.ndarray
    values: np.ndarray
    policy_logps: np.ndarray
    base_logps: np.ndarray


def logsumexp(x: np.ndarray) -> float:
    peak = x.max()
    return float(peak + np.log(np.exp(x - peak).sum()))


def log_sigmoid(x: float) -> float:
    return float(min(x, 0.0) - np.log1p(np.exp(-abs(x))))


def objective(
    adapter_logits, base_logits, input_ids, completion_mask, *,
    alpha_0: float, alpha_tilde: float, gamma: float, chi2_coef: float, parametrization: str,
    bootstrap: str, length_normalization: str, mask_alignment: str,
    num_pairs: float | None = None, num_actions: float | None = None,
) -> Objective:
    """The whole loss of a padded batch [2B, T, V]; options by their ``ObjectiveConfig`` names."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (adapter_logits, base_logits))
    ids, mask = np.asarray(input_ids), np.asarray(completion_mask).astype(bool)
    sequences, length = ids.shape
    pairs = sequences // 2
    returns, policy_logps, base_logps = (np.zeros(sequences) for _ in range(3))
    token_rewards, values = np.zeros((sequences, length)), np.zeros((sequences, length))
    squares, actions_seen = 0.0, 0

    for i in range(sequences):
        if mask_alignment == "action":  # the masked token is the action; none stands at position 0
            positions = [t for t in range(1, length) if mask[i, t]]
        else:  # the output at a masked token is scored: the action is the token after it
            positions = [t + 1 for t in range(length - 1) if mask[i, t]]
        q_of_action, value_of_state = [], []
        for t in positions:
            state, action = t - 1, ids[i, t]
            log_base = b[i, state] - logsumexp(b[i, state])
            if parametrization == "policy":
                q = alpha_tilde * a[i, state] - alpha_0 * b[i, state]
            else:
                q = a[i, state]
            z = (q + alpha_0 * log_base) / alpha_tilde
            value_of_state.append(alpha_tilde * logsumexp(z))
            q_of_action.append(q[action])
            policy_logps[i] += z[action] - logsumexp(z)
            base_logps[i] += log_base[action]
        for k, t in enumerate(positions):
            if bootstrap == "next":
                following = value_of_state[k + 1] if k + 1 < len(positions) else 0.0
            else:
                following = value_of_state[k]
            reward = q_of_action[k] - gamma * following
            token_rewards[i, t], values[i, t] = reward, value_of_state[k]
            returns[i] += reward
            squares += reward**2
        actions_seen += len(positions)
        if length_normalization == "completion" and positions:
            returns[i] /= len(positions)
        elif length_normalization == "padded" and length > 1:
            returns[i] /= length - 1

    chosen, rejected = returns[:pairs], returns[pairs:]
    preference = -sum(log_sigmoid(c - r) for c, r in zip(chosen, rejected, strict=True))
    preference /= pairs if num_pairs is None else num_pairs
    chi2 = squares / (max(actions_seen, 1) if num_actions is None else num_actions)
    return Objective(
        preference + chi2_coef * chi2, preference, chi2, chosen, rejected, token_rewards, values,
        policy_logps, base_logps,
    )


def authors_objective(
    q, base_logits, input_ids, completion_mask, *,
    alpha_0: float = 0.01, alpha_tilde: float = 1.0, gamma: float = 1.0, beta: float = 0.1,
) -> float:
    """The authors' published computation: V of the same state, the mask not shifted, the sum of
    rewards over the padded length.

    Their cross-entropy stacks two halves of the batch and its label picks the second of them; by
    variable name that half is the "rejected" one. What is preferred by meaning is what we call
    chosen, here as everywhere.
    """
    q, b = (np.asarray(x, dtype=np.float64) for x in (q, base_logits))
    ids = np.asarray(input_ids)
    mask = np.asarray(completion_mask).astype(np.float64)[:, :-1]

    def lse(x):
        peak = x.max(-1, keepdims=True)
        return (peak + np.log(np.exp(x - peak).sum(-1, keepdims=True)))[..., 0]

    log_base = b - lse(b)[..., None]
    value = alpha_tilde * lse((q + alpha_0 * log_base) / alpha_tilde)
    q_taken = np.take_along_axis(q[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    reward = q_taken - gamma * value[:, :-1]
    sums = (reward * mask).sum(-1) / (ids.shape[1] - 1)
    chosen, rejected = np.split(sums, 2)
    preference = np.mean([-log_sigmoid(m) for m in chosen - rejected])
    return float(preference + beta * (mask * reward**2).sum() / mask.sum())
