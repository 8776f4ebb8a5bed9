"""What every backend puts out where logits are NaN, −inf or far from 0, and random inputs of all
operators against float64 (``fuzz``): a few here, an hour of them by ``make endurance``."""

from __future__ import annotations

import interpreter  # first: it decides how triton is imported
import pytest
import torch
from cases import COEFFICIENTS, FLOAT32_EPS, Case, logits_case
from cuda_emulator import emulated, find_nvcc
from fuzz import TRIALS, trial
from fuzz_inputs import ISAS, Draw, on_cpu, on_triton
from fuzz_oracle import Failure, agree

from qadapter_kernels import (
    Coefficients,
    bradley_terry,
    dispatch,
    linear_soft_value,
    native,
    reference,
    soft_value,
)
from qadapter_kernels.reference import LogitHead, ScoreRows

pytestmark = interpreter.quiet
INF, NAN = torch.inf, torch.nan
BOTH = Coefficients(0.3, 0.7, 1.0, 0.2)  # both streams are part of u


@pytest.fixture(params=["torch", *(f"cpu {isa}" for isa in ISAS), "cuda", "triton"])
def backend(request):
    name, _, isa = request.param.partition(" ")
    if name == "torch":
        yield name
    elif name == "cpu":
        if dispatch.load("cpu").unavailable_reason("cpu"):
            pytest.skip("the C++ library is not built")
        try:
            with on_cpu(isa):
                yield name
        except ValueError:
            pytest.skip(f"no {isa} here")
    elif name == "cuda":
        if find_nvcc() is None:
            pytest.skip("nvcc was not found")
        with emulated(order=3):
            yield name
    else:
        if not interpreter.INTERPRETED:
            pytest.skip("CPU tensors need the interpreter")
        with on_triton():
            yield name


def outputs(case: Case, backend: str, **options):
    """(q, V, log π(a), lse(b), entropy, KL(π̃‖π), KL(π‖π̃)) and the gradient."""
    a = case.adapter_logits.detach().requires_grad_()
    soft, statistics = soft_value(
        a, case.base_logits, case.actions, **case.coef._asdict(), return_statistics=True,
        backend=backend, **options,
    )
    (grad,) = torch.autograd.grad([soft.q_action, soft.value], a, [case.grad_q, case.grad_v])
    return [x.detach() for x in (*soft, *statistics)], grad


@pytest.mark.parametrize("name", ["policy", "policy_dial", "q"])
@pytest.mark.parametrize("how_many", ["one", "all", "all but one", "beside −inf"])
def test_nan_of_the_policy_reaches_everything_that_is_made_of_it(backend, how_many, name):
    """It is not taken for a row without support; the other rows don't see it."""
    case = logits_case(rows=3, vocab=1100, coef=COEFFICIENTS[name])
    a = case.adapter_logits
    a[1] = {"one": a[1], "beside −inf": torch.full_like(a[1], -INF)}.get(how_many, NAN)
    a[1, 700] = 1.0 if how_many == "all but one" else NAN
    case.grad_v[1] = 0.0  # not even by an upstream gradient of 0
    (_, value, logprob, lse, *statistics), grad = outputs(case, backend)
    assert value[1].isnan() and all(x[1].isnan() for x in statistics)
    assert grad[1][a[1] != -INF].isnan().all()
    assert logprob[1].isfinite() and lse[1].isfinite()
    assert value[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


def test_nan_of_the_base_reaches_the_numbers_that_are_made_of_it(backend):
    """In the policy parametrization π̃ is not: its entropy and the gradient stay numbers."""
    case = logits_case(rows=3, vocab=1100, coef=COEFFICIENTS["policy"])
    case.base_logits[1, 3] = NAN
    case.base_logits[1, case.actions[1]] = -INF  # log π(a) = −inf − NaN
    (q, value, logprob, lse, entropy, *divergences), grad = outputs(case, backend)
    for x in (value, logprob, lse, *divergences):
        assert x[1].isnan() and x[[0, 2]].isfinite().all()
    assert q[1] == -INF and entropy.isfinite().all() and grad[1].isfinite().all()


def test_nan_in_one_stream_is_not_hidden_by_what_the_other_excludes(backend):
    """In either, at a column that −inf in the other excludes; also where no token is left."""
    case = logits_case(rows=4, vocab=40, coef=BOTH)
    a, b = case.adapter_logits, case.base_logits
    a[0, 5], b[0, 5] = NAN, -INF
    a[1, 5], b[1, 5] = -INF, NAN
    a[2], b[2, 5] = -INF, NAN
    a[3, 5], b[3, 5] = INF, -INF  # no NaN: what is excluded stays it
    case = case._replace(actions=torch.tensor([5, 5, 5, 5]))
    (q, value, *_), grad = outputs(case, backend)
    assert q[:3].isnan().all() and value[:3].isnan().all()
    assert grad[:2].isnan().any(-1).all()
    assert q[3] == -INF and value[3].isfinite() and grad[3].isfinite().all()


def test_masked_rows_are_0_in_everything_whatever_they_hold(backend):
    """Statistics too: a masked row is no state, and what a mean over states leaves out."""
    case = logits_case(rows=6, vocab=40, coef=BOTH)
    for i, x in enumerate((NAN, INF, -INF, 1e4)):
        case.adapter_logits[i] = case.base_logits[i] = x
    case.adapter_logits[4, 3], case.base_logits[4, 4] = -INF, -INF
    mask = torch.tensor([False] * 5 + [True])
    found, grad = outputs(case, backend, row_mask=mask)
    for x in (*found, grad):
        assert (x[:5] == 0).all() and x[5].isfinite().all()


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e4])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_rows_of_the_policy_sum_to_1_whatever_the_offset(backend, name, offset):
    """Σ ∂V/∂a = c_a: a normalizer that is rounded at the offset's size would be off by 5e-4."""
    case = logits_case(rows=4, vocab=2100, coef=COEFFICIENTS[name])
    a, b = case.adapter_logits + offset, case.base_logits + offset
    for actions in (case.actions, torch.full((4,), -1)):
        leaf = a.clone().requires_grad_()
        soft = soft_value(leaf, b, actions, **case.coef._asdict(), backend=backend)
        (grad,) = torch.autograd.grad(soft.value.sum(), leaf)
        sums = grad.double().sum(-1) / case.coef.adapter_coef
        assert (sums - 1).abs().max() < 16 * FLOAT32_EPS


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_the_value_keeps_its_digits_where_both_streams_share_an_offset(backend, offset):
    """V = lse(a) − lse(b) is small; each of the two is rounded to 1e-3 there."""
    case = logits_case(rows=4, vocab=300, coef=COEFFICIENTS["policy"])
    a, b = case.adapter_logits + offset, case.base_logits + offset
    soft = soft_value(a, b, case.actions, **case.coef._asdict(), backend=backend)
    exact = a.double().logsumexp(-1) - b.double().logsumexp(-1)
    assert (soft.value - exact).abs().max() < 16 * FLOAT32_EPS * (1 + exact.abs().max())


def test_p_prime_of_the_hidden_level_sums_to_0_and_keeps_nan_and_inf(backend):
    z = 4 * torch.randn(5, 1100) - 1e4
    z[1, 7], z[2, 7], z[3] = NAN, INF, -INF
    actions = torch.tensor([3, 3, 7, 3, -2])
    lse, _, found = dispatch.load(backend).rows_forward(
        z, z.clone(), actions, 1.0, None, 1.0, None, True, z.dtype, True
    )
    assert z[0].double().sum().abs() < 16 * FLOAT32_EPS
    assert z[1].isnan().all() and lse[1].isnan() and found[:, 1].isnan().all()
    assert z[2, 7].isnan() and lse[2] == INF
    assert not z[3:].any() and lse[3] == -INF and lse[4] == 0 and not found[:, 3:].any()


def test_an_action_that_the_base_excludes_has_no_gradient(backend):
    """q = a − b is −inf there, although π̃, which the base has no say in, may take it; with the
    base's two numbers alone too."""
    case = logits_case(rows=4, vocab=40, coef=COEFFICIENTS["policy"])
    b = case.base_logits.scatter(1, case.actions.clamp_min(0)[:, None], -INF)
    (q, *_), grad = outputs(case._replace(base_logits=b), backend)
    assert (q[case.actions >= 0] == -INF).all()
    expected = case.grad_v[:, None] * case.adapter_logits.softmax(-1)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    leaf = case.adapter_logits.detach().requires_grad_()
    soft = soft_value(
        leaf, None, case.actions, base_logsumexp=b.logsumexp(-1), backend=backend,
        base_action_logit=torch.full((4,), -INF), **case.coef._asdict(),
    )
    (grad,) = torch.autograd.grad([soft.q_action, soft.value], leaf, [case.grad_q, case.grad_v])
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_an_excluded_action_has_no_gradient_at_the_hidden_level_either(backend):
    """Its q is −inf: the upstream gradient of it leads nowhere, and V's has no part of it."""
    hidden, weight, bias = torch.randn(3, 8), torch.randn(20, 8), torch.randn(20)
    bias[5] = -INF
    options = dict(bias=bias, backend=backend, **COEFFICIENTS["policy"]._asdict())
    leaf = hidden.clone().requires_grad_()
    soft = linear_soft_value(leaf, hidden, weight, torch.tensor([5, 5, 7]), **options)
    of_q = torch.autograd.grad(soft.q_action.sum(), leaf, retain_graph=True)[0]
    of_both = torch.autograd.grad(soft.q_action.sum() + soft.value.sum(), leaf, retain_graph=True)
    of_v = torch.autograd.grad(soft.value.sum(), leaf)[0]
    assert (soft.q_action[:2] == -INF).all() and not of_q[:2].any() and of_q[2].any()
    policy = (hidden @ weight.t() + bias).softmax(-1) @ weight
    torch.testing.assert_close(of_v, policy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_both[0][:2], of_v[:2])


@pytest.mark.parametrize("strength", [None, 0.5, 1.0])
def test_log_probabilities_for_decoding_keep_nan(backend, strength):
    a, b = torch.randn(3, 600), torch.randn(3, 600)
    a[0, 5], a[1], a[1, 3] = NAN, -INF, NAN
    a[2] = -INF
    strengths = None if strength is None else torch.full((3,), strength)
    found = dispatch.load(backend).combine_logits(a, b, BOTH, strengths)
    assert found[:2].isnan().all() and (found[2] == -INF).all()


def test_a_state_of_nan_has_no_top_token_of_the_base(backend):
    if backend == "cuda":
        pytest.skip("PyTorch serves it")
    base, difference = torch.randn(3, 1100), torch.zeros(3, 1100)
    base[0, 5], difference[1, 5] = NAN, NAN
    base[0, 3] = -INF
    out = ScoreRows(*dispatch.load(backend).score_rows(
        base, difference, torch.tensor([3, 3, 3]), LogitHead(), (1.0, 0.0), BOTH
    ))
    assert out.same_top1.tolist() == [0.0, 0.0, 1.0]
    assert out.policy_logprob[:2].isnan().all() and out.base_logprob[0].isnan()
    assert out.value[:2].isnan().all() and out.kl_policy_base[:2].isnan().all()


@pytest.mark.parametrize("bootstrap", ["next", "current"])
def test_a_coefficient_of_0_reads_no_infinite_reward(backend, bootstrap):
    """An excluded action's reward is −inf: r² and V have no say where χ² and γ are 0."""
    q = torch.tensor([1.0, -1.0, 2.0, -INF]).requires_grad_()
    v = torch.tensor([1.0, INF, NAN, 0.0]).requires_grad_()
    out = bradley_terry(
        q, v, torch.tensor([0, 2, 4]), gamma=0.0, chi2_coef=0.0, bootstrap=bootstrap,
        backend=backend,
    )
    assert out.loss == out.preference_loss == 0.0
    grads = torch.autograd.grad(out.loss, [q, v], allow_unused=True, materialize_grads=True)
    assert all((x == 0).all() for x in grads)


@pytest.mark.parametrize("alpha_tilde", [1e-30, 1e-12, 1e-4])
@pytest.mark.parametrize("parametrization", ["policy", "q"])
def test_a_small_alpha_tilde_is_right(backend, parametrization, alpha_tilde):
    """V → max q + α₀·(what the base says there): nothing overflows on the way."""
    c_a, c_b = (alpha_tilde, 0.0) if parametrization == "policy" else (1.0, 0.0)
    coef = Coefficients(0.0, alpha_tilde, c_a, c_b)
    case = logits_case(rows=3, vocab=300, coef=coef)
    (_, value, *_, entropy, _, _), grad = outputs(case, backend)
    exact = reference.soft_value(
        case.adapter_logits.double(), case.base_logits.double(), case.actions, coef
    )
    agree("value", value, exact.value, 32 * FLOAT32_EPS * c_a * 20)
    assert entropy.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("numbers, says", [
    ((1.0, 1e-40, 1.0, 0.0), "alpha_tilde must be positive, at least 1e-30"),
    ((1.0, 0.0, 1.0, 0.0), "alpha_tilde must be positive"),
    ((1e35, 1.0, 1.0, 0.0), "alpha_0 must not be larger than 1e[+]30 in size, got 1e[+]35"),
    ((0.0, 1e31, 1.0, 0.0), "alpha_tilde must not be larger"),
    ((0.0, 1.0, -1e31, 0.0), "adapter_coef must not be larger"),
    ((0.0, 1.0, 1.0, 10**5000), "base_coef must not be larger .* got more"),
    ((1.0, 1e-15, 1e20, 0.0), "alpha_tilde is 1e-15: too small beside .* 1e[+]20"),
    ((1e20, 1e-15, 1e-15, 0.0), "alpha_tilde is 1e-15: too small beside"),
    ((NAN, 1.0, 1.0, 0.0), "alpha_0 must be a finite number"),
])
def test_numbers_without_room_in_float32_are_refused(numbers, says):
    case = logits_case()
    named = dict(zip(Coefficients._fields, numbers, strict=True))
    with pytest.raises(ValueError, match=says):
        soft_value(*case[:3], **named)
    hidden = torch.randn(5, 8)
    with pytest.raises(ValueError, match=says):
        linear_soft_value(hidden, hidden, torch.randn(9, 8), torch.zeros(5).long(), **named)


@pytest.mark.parametrize("numbers, says", [
    ({"chi2_coef": 1e40}, "chi2_coef must not be larger"),
    ({"num_pairs": 1e-40}, "num_pairs must be 0 or at least 1e-30"),
    ({"num_actions": INF}, "num_actions must be a finite number"),
])
def test_numbers_of_the_sequence_loss_without_room_are_refused(numbers, says):
    x = torch.randn(2)
    with pytest.raises(ValueError, match=says):
        bradley_terry(x, x, torch.tensor([0, 1, 2]), **numbers)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_library_of_other_sources_is_not_called(monkeypatch, name):
    """Its functions would take the arguments for something else."""
    if not (native.LIBRARY_FOLDER / f"libqadapter_{name}.so").exists():
        pytest.skip(f"the {name} library is not built")
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert "built from other sources" in native._load.__wrapped__(name)
    monkeypatch.setitem(native.SIGNATURES[name], "qadapter_none_such", (None, []))
    assert "build_native --inplace" in native._load.__wrapped__(name)


# --- random inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("operator", TRIALS)
def test_random_inputs_of(operator, seed):
    trial(operator, seed)


def test_a_trial_says_how_to_run_it_again(monkeypatch):
    def wrong(draw: Draw) -> None:
        agree("numbers", torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), 0.1)

    monkeypatch.setitem(TRIALS, "soft_value", wrong)
    with pytest.raises(Failure, match=r"^soft_value:5: numbers is wrong at 1 of 2 places"):
        trial("soft_value", 5)
