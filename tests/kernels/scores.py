"""Cases and yardsticks of evaluation's scores, for every backend's tests.

Shapes: N states, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import assert_close_as_eager
from torch import Tensor

from qadapter_kernels import Coefficients, linear_state_scores, reference
from qadapter_kernels.reference import ScoreRows

OBJECTIVES = {
    "policy": Coefficients(1.0, 1.0, 1.0, -1.0),
    "policy, other alphas": Coefficients(0.3, 0.7, 0.7, -0.3),
    "q": Coefficients(0.5, 2.0, 1.0, 0.0),
    "q, the authors'": Coefficients(0.01, 1.0, 1.0, 0.0),
}
STRENGTHS = (0.0, 0.5, 1.0, 2.0)
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "excluding": {"bias": True, "excluded": (0, 5, 1029)},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "softcap, bias and scale": {"softcap": 5.0, "bias": True, "logit_scale": 1.7},
}


class ScoreCase(NamedTuple):
    adapter_hidden: Tensor
    base_hidden: Tensor
    weight: Tensor
    actions: Tensor
    weights: tuple[float, float]
    objective: Coefficients
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def policy_weights(objective: Coefficients, strength: float) -> tuple[float, float]:
    """Of a and b in z_w = w·z + (1 − w)·log π (design §2, fact 7)."""
    scale = strength / objective.alpha_tilde
    return scale * objective.adapter_coef, scale * objective.base_weight + (1 - strength)


def score_case(
    objective: str = "policy", strength: float = 1.0, head: str = "plain", rows: int = 7,
    vocab: int = 1031, hidden: int = 48, seed: int = 0, device: str = "cpu",
) -> ScoreCase:
    """Logits of a standard deviation of 4; the third row has no action, the fourth's is the column
    that a head may exclude."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    options = {"bias": False, "excluded": (), "logit_scale": 1.0, "softcap": None} | HEADS[head]
    base = normal(rows, hidden)
    actions = torch.randint(vocab, (rows,), generator=generator)
    actions[:1], actions[2:3], actions[3:4] = vocab - 1, -1, 5
    bias = normal(vocab) if options["bias"] else None
    for column in options["excluded"]:
        bias[column] = -torch.inf
    weight = 4 / options["logit_scale"] / hidden**0.5 * normal(vocab, hidden)
    tensors = (base + 0.3 * normal(rows, hidden), base, weight, actions)
    coef = OBJECTIVES[objective]
    return ScoreCase(
        *(x.to(device) for x in tensors), policy_weights(coef, strength), coef,
        None if bias is None else bias.to(device), options["logit_scale"], options["softcap"],
    )


def definition(case: ScoreCase, dtype: torch.dtype = torch.float64) -> ScoreRows:
    """From two tensors of logits, each formed by itself."""
    def logits(hidden: Tensor) -> Tensor:
        products = hidden.to(dtype) @ case.weight.to(dtype).t()
        x = case.logit_scale * (products if case.bias is None else products + case.bias.to(dtype))
        return x if case.softcap is None else case.softcap * torch.tanh(x / case.softcap)

    return reference.score_rows(
        logits(case.adapter_hidden), logits(case.base_hidden), case.actions, case.weights,
        case.objective,
    )


def run(case: ScoreCase, backend: str, **options) -> ScoreRows:
    found = linear_state_scores(
        case.adapter_hidden, case.base_hidden, case.weight, case.actions,
        policy_weights=case.weights, objective=case.objective, bias=case.bias,
        logit_scale=case.logit_scale, softcap=case.softcap, backend=backend, **options,
    )
    return ScoreRows(
        found.soft.q_action, found.soft.value, found.base_logprob, found.soft.base_logsumexp,
        found.policy_logprob, found.kl_base_policy, found.kl_policy_base, found.same_top1,
    )


def check(result: ScoreRows, case: ScoreCase) -> None:
    """Against float64, with what float32 logits and ``log_softmax`` lose there as the yardstick."""
    exact, eager, coef = definition(case), definition(case, torch.float32), case.objective
    b = 1 + float(exact.base_logsumexp.abs().max())
    size = (abs(case.weights[0]) + abs(case.weights[1])) * 2 * b
    q = (abs(coef.adapter_coef) + abs(coef.base_coef) + 2 * coef.alpha_0) * 2 * b
    scales = ScoreRows(q, q, b, b, size, size + b, size + b, 0.0)
    for name, x, y, z, s in zip(ScoreRows._fields, result, exact, eager, scales, strict=True):
        assert_close_as_eager(x.float(), y, z, s, name)


def check_do_nothing(case: ScoreCase, backend: str) -> None:
    """h_a = h_b: the base to the last bit at every strength, whatever the head."""
    out = run(case._replace(adapter_hidden=case.base_hidden.clone()), backend)
    assert torch.equal(out.policy_logprob, out.base_logprob)
    for name in ("kl_base_policy", "kl_policy_base"):
        assert not getattr(out, name).any(), name
    assert bool((out.same_top1 != 0).all())
    if case.objective.alpha_0 == case.objective.alpha_tilde:
        assert not out.value.any() and not out.q_action[out.q_action.isfinite()].any()
