"""The definition itself, held against NumPy and against its own gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import COEFFICIENTS, logits_case
from hypothesis import given
from hypothesis import strategies as st
from oracle import logsumexp

from qadapter_kernels import Coefficients, reference

INF = torch.inf


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("vocab", [1, 2, 33])
def test_soft_value_is_the_equations(name, vocab):
    """Row by row through log π, z and V = α̃·lse(z), as the paper writes it."""
    case = logits_case(rows=4, vocab=vocab, dtype=torch.float64, coef=COEFFICIENTS[name])
    alpha_0, alpha_tilde, c_a, c_b = case.coef
    out = reference.soft_value(case.adapter_logits, case.base_logits, case.actions, case.coef)
    for i, action in enumerate(case.actions.tolist()):
        a, b = case.adapter_logits[i].numpy(), case.base_logits[i].numpy()
        log_base, q = b - logsumexp(b), c_a * a + c_b * b
        z = (q + alpha_0 * log_base) / alpha_tilde
        assert out.value[i].item() == pytest.approx(alpha_tilde * logsumexp(z), abs=1e-12)
        assert out.base_logsumexp[i].item() == pytest.approx(logsumexp(b), abs=1e-12)
        assert out.q_action[i].item() == pytest.approx(q[action] if action >= 0 else 0, abs=1e-12)
        expected = log_base[action] if action >= 0 else 0
        assert out.base_logprob[i].item() == pytest.approx(expected, abs=1e-12)

        log_policy = z - logsumexp(z)
        policy, base = np.exp(log_policy), np.exp(log_base)
        entropy, kl_policy, kl_base = (float(x[i]) for x in out.statistics)
        assert entropy == pytest.approx(-(policy * log_policy).sum(), abs=1e-12)
        assert kl_policy == pytest.approx((policy * (log_policy - log_base)).sum(), abs=1e-12)
        assert kl_base == pytest.approx((base * (log_base - log_policy)).sum(), abs=1e-12)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_gradient_is_exact_and_as_stated(name):
    """gradcheck, and ∂a = c_a·(g·onehot + v·π̃) of design §2."""
    case = logits_case(rows=4, vocab=6, dtype=torch.float64, coef=COEFFICIENTS[name], scale=1.0)
    a = case.adapter_logits.requires_grad_()

    def outputs(a):
        return reference.soft_value(a, case.base_logits, case.actions, case.coef)[:2]

    assert torch.autograd.gradcheck(outputs, (a,))
    g, v = case.grad_q.double(), case.grad_v.double()
    (grad,) = torch.autograd.grad(outputs(a), a, [g, v])
    policy = reference.policy_logits(a.detach(), case.base_logits, case.coef).softmax(-1)
    onehot = torch.zeros_like(policy)
    for i, action in enumerate(case.actions.tolist()):
        if action >= 0:
            onehot[i, action] = 1.0
    expected = case.coef.adapter_coef * (g[:, None] * onehot + v[:, None] * policy)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_rows_of_minus_infinity_have_no_value_and_no_gradient():
    a = torch.tensor([[-INF, -INF], [1.0, -INF], [1.0, 2.0]], dtype=torch.float64)
    a.requires_grad_()
    b = torch.zeros(3, 2, dtype=torch.float64)
    b[2] = torch.tensor([-INF, 0.0])
    out = reference.soft_value(a, b, torch.tensor([0, 1, 0]), Coefficients(0.5))
    assert out.value[0] == -INF and torch.isfinite(out.value[1:]).all()
    # An action outside the support of either stream has q = −inf where that stream counts.
    assert out.q_action.tolist() == [-INF, -INF, 1.0]
    assert out.base_logprob[2] == -INF
    kept = out.value[1:].sum() + out.q_action[2]
    (grad,) = torch.autograd.grad(kept, a)
    assert torch.equal(grad[0], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(grad[1], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.equal(grad[2], torch.tensor([1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("base_row", [[-INF, -INF], [-INF, 0.0]])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_no_output_is_ever_nan_in_the_base_stream(name, base_row):
    b = torch.tensor([base_row, [0.0, 1.0]], dtype=torch.float64)
    a = torch.zeros(2, 2, dtype=torch.float64)
    out = reference.soft_value(a, b, torch.tensor([0, 1]), COEFFICIENTS[name])
    for field in (*out[:5], *out.statistics):
        assert not field.isnan().any()
    assert out.base_logprob[0] == -INF


@pytest.mark.parametrize("vocab", [1, 5])
def test_masked_rows_and_rows_without_action(vocab):
    case = logits_case(rows=3, vocab=vocab, dtype=torch.float64)
    actions = torch.tensor([-2, -1, 0])
    a = case.adapter_logits.clone()
    a[0] = torch.nan  # a masked row may hold anything
    out = reference.soft_value(a, case.base_logits, actions, case.coef)
    for field in (*out[:5], *out.statistics):
        assert (field[..., 0] == 0).all()
    assert out.q_action[1] == 0 and out.base_logprob[1] == 0
    assert out.value[1] != 0


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0, 3), st.floats(0.05, 3))
def test_common_offsets_move_the_value_and_not_the_policy(shift_a, shift_b, alpha_0, alpha_tilde):
    """V(a + s, b + t) = V(a, b) + c_a·s + c_b·t: the base's own offset cancels in log π."""
    coef = Coefficients(alpha_0, alpha_tilde, alpha_tilde, -alpha_0)
    case = logits_case(rows=2, vocab=5, dtype=torch.float64, coef=coef)
    plain, moved = (
        reference.soft_value(
            case.adapter_logits + s, case.base_logits + t, case.actions, coef
        )
        for s, t in ((0.0, 0.0), (shift_a, shift_b))
    )
    expected = plain.value + alpha_tilde * shift_a - alpha_0 * shift_b
    torch.testing.assert_close(moved.value, expected, rtol=0, atol=1e-10)
    for x, y in zip(plain.statistics, moved.statistics, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_float32_keeps_the_digits_of_base_logprob_under_a_large_offset():
    """(b[a] − max) − log Σ loses nothing to the offset; b[a] − lse(b) would lose 1e-3 here."""
    b = torch.tensor([[16384.0, 16385.0, 16383.5]])
    out = reference.soft_value(torch.zeros_like(b), b, torch.tensor([0]), COEFFICIENTS["q"])
    exact = b.double().log_softmax(-1)[0, 0]
    assert abs(out.base_logprob.double() - exact) < 1e-6


def test_nothing_flows_to_the_base():
    case = logits_case(dtype=torch.float64)
    a, b = case.adapter_logits.requires_grad_(), case.base_logits.requires_grad_()
    out = reference.soft_value(a, b, case.actions, COEFFICIENTS["policy_dial"])
    grads = torch.autograd.grad(out.value.sum() + out.q_action.sum(), (a, b), allow_unused=True)
    assert grads[0] is not None and grads[1] is None


def test_logsumexp_of_an_empty_row_has_a_zero_gradient():
    x = torch.tensor([[-INF, -INF], [0.0, -INF]], dtype=torch.float64, requires_grad=True)
    lse = reference.logsumexp(x)
    assert lse.tolist() == [-INF, 0.0]
    (grad,) = torch.autograd.grad(lse.sum(), x)
    assert grad.tolist() == [[0.0, 0.0], [1.0, 0.0]]
