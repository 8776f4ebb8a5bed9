"""A base that is two numbers a row: b[action] and lse(b) stand for its logits or hidden states."""

from __future__ import annotations

import pytest
import torch
from cases import COEFFICIENTS, CPU_BACKENDS, DTYPES, linear_case, same_bits

from qadapter_kernels import (
    Coefficients,
    linear_action_logit,
    linear_logsumexp,
    linear_soft_value,
    soft_value,
)

POLICY = COEFFICIENTS["policy"]
FIELDS = ("q_action", "value", "base_logprob", "base_logsumexp")


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


def numbers(case, backend=None):
    head = {"bias": case.bias, "logit_scale": case.logit_scale}
    return {
        "base_action_logit": linear_action_logit(
            case.base_hidden, case.weight, case.actions.clamp_min(0), **head
        ),
        "base_logsumexp": linear_logsumexp(
            case.base_hidden, case.weight, case.actions, **head, backend=backend
        ),
    }


def run(case, base, backend, **options):
    hidden = case.adapter_hidden.clone().requires_grad_()
    soft = linear_soft_value(
        hidden, base, case.weight, case.actions, **POLICY._asdict(), bias=case.bias,
        logit_scale=case.logit_scale, backend=backend, **options,
    )
    (soft.q_action * case.grad_q + soft.value * case.grad_v).sum().backward()
    return soft, hidden.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_hidden_level_is_the_same_to_the_bit(backend, dtype):
    case = linear_case(rows=9, dtype=dtype, bias=True, logit_scale=0.5, coef=POLICY)
    case.actions[4] = -1
    cached = numbers(case, backend)
    (ours, gradient), (theirs, expected) = (
        run(case, None, backend, **cached),
        run(case, case.base_hidden, backend, base_logsumexp=cached["base_logsumexp"]),
    )
    for name in FIELDS:
        assert same_bits(getattr(ours, name), getattr(theirs, name)), name
    assert same_bits(gradient, expected)


def test_the_logits_level_is_the_same_but_for_the_last_rounding(backend):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(7, 1_031, generator=generator) * 4 for _ in range(2))
    actions = torch.tensor([5, -1, 0, 1_030, 8, 9, 10])
    b[2, 0] = -torch.inf  # an action that the base excludes
    mask = torch.tensor([True] * 5 + [False] * 2)
    found = []
    for base, given in (
        (b, {}), (None, {"base_action_logit": b.gather(1, actions.clamp_min(0)[:, None])[:, 0]})
    ):
        logits = a.clone().requires_grad_()
        soft = soft_value(
            logits, base, actions, **POLICY._asdict(), base_logsumexp=b.logsumexp(-1),
            row_mask=mask, backend=backend, **given,
        )
        (soft.q_action[soft.q_action.isfinite()].sum() + 2 * soft.value.sum()).backward()
        found.append((soft, logits.grad))
    (theirs, expected), (ours, gradient) = found
    # α̃·lse(u) and α₀·lse(b) are below 20 here; a kernel may add them without rounding between.
    rounding = 20 * torch.finfo(torch.float32).eps
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), rtol=0, atol=rounding, msg=name
        )
    assert torch.equal(gradient, expected)


def test_the_gradient_over_the_logits(backend):
    logits = torch.randn(3, 64, requires_grad=True)
    actions, zeros = torch.tensor([1, 2, 3]), torch.zeros(3)
    given = {"base_action_logit": zeros, "base_logsumexp": zeros}
    soft = soft_value(logits * 1.0, None, actions, **POLICY._asdict(), **given,
                      inplace_backward=True, backend=backend)
    soft.value.sum().backward()
    ours, logits.grad = logits.grad, None
    soft = soft_value(logits * 1.0, None, actions, **POLICY._asdict(), **given, backend=backend)
    soft.value.sum().backward()
    assert torch.equal(ours, logits.grad)


def test_no_product_with_the_base(backend):
    case = linear_case(rows=6, coef=POLICY, dtype=torch.float32)
    cached = numbers(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(case, None, backend, **cached)
    products = {"aten::mm", "aten::addmm", "aten::matmul"}
    assert sum(row.count for row in profile.key_averages() if row.key in products) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_action_logit": None}, "base_action_logit and base_logsumexp are needed"),
        ({"base_logsumexp": None}, "base_action_logit and base_logsumexp are needed"),
        ({"base_coef": 0.25}, "have a weight in the policy"),
        ({"return_statistics": True}, "return_statistics needs the base's logits"),
        ({"base_action_logit": torch.zeros(2)}, r"must have shape \[3\]"),
        ({"base": torch.zeros(3, 8)}, "not both"),
    ],
    ids=str,
)
@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_what_it_can_not_stand_for(change, says, level):
    options = {
        **Coefficients(alpha_0=0.5, base_coef=-0.5)._asdict(),
        "base_action_logit": torch.zeros(3), "base_logsumexp": torch.zeros(3), **change,
    }
    base = options.pop("base", None)
    x, actions = torch.randn(3, 8), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=says):
        if level == "logits":
            soft_value(x, base, actions, **options)
        else:
            linear_soft_value(x, base, torch.randn(16, 8), actions, **options)


def test_it_compiles_whole():
    weight, actions = torch.randn(40, 8), torch.tensor([1, 2, 3])

    def value(hidden, logit, lse):
        soft = linear_soft_value(hidden, None, weight, actions, **POLICY._asdict(),
                                 base_action_logit=logit, base_logsumexp=lse)
        return soft.value.sum() + soft.q_action.sum()

    inputs = torch.randn(3, 8), torch.randn(3), torch.randn(3)
    torch.testing.assert_close(torch.compile(value, fullgraph=True)(*inputs), value(*inputs))
