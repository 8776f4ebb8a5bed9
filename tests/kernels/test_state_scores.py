"""Scores of states beside the definition, for every backend and instruction set that serves CPU
tensors."""

from __future__ import annotations

import pytest
import scores
import torch
from cases import CPU_BACKENDS, error, same_bits
from scores import HEADS, OBJECTIVES, STRENGTHS, check, check_do_nothing, run, score_case
from test_cpu_backend import UNAVAILABLE, isa, threads  # noqa: F401  fixtures

from qadapter_kernels import dispatch, linear_state_scores
from qadapter_kernels.reference import LogitHead


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_definition(backend, objective, strength, head):
    case = score_case(objective, strength, head)
    check(run(case, backend), case)


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
@pytest.mark.parametrize("head", HEADS)
def test_every_instruction_set(isa, head):  # noqa: F811
    case = score_case("policy, other alphas", 0.5, head, rows=3, vocab=20_011)
    check(run(case, "cpu"), case)
    check_do_nothing(score_case("policy", 0.3, head, vocab=9001), "cpu")


@pytest.mark.parametrize("strength", [*STRENGTHS, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("head", HEADS)
def test_an_adapter_that_does_nothing_is_the_base_to_the_last_bit(backend, head, strength):
    check_do_nothing(score_case("policy", strength, head), backend)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 1023, 1024, 1025, 8191, 8192, 8193, 16_385])
def test_odd_vocabularies_and_the_edges_of_blocks(backend, vocab):
    case = score_case("policy, other alphas", 0.5, "bias", rows=4, vocab=vocab)
    case.actions[3:] = vocab // 2
    check(run(case, backend), case)


def test_a_model_without_an_adapter(backend):
    """One product; log-probabilities and lse(b) are those of the same rows beside an adapter."""
    case = score_case("policy", 1.0, "softcap, bias and scale")
    plain = run(case._replace(adapter_hidden=None), backend)
    beside = run(case, backend)
    assert same_bits(
        [plain.base_logprob, plain.base_logsumexp], [beside.base_logprob, beside.base_logsumexp]
    )
    assert torch.equal(plain.policy_logprob, plain.base_logprob) and plain.same_top1.all()
    for name in ("q_action", "value", "kl_base_policy", "kl_policy_base"):
        assert not getattr(plain, name).any(), name


def test_without_an_objective_there_are_no_rewards(backend):
    case = score_case("q", 0.5)
    out = run(case._replace(objective=None), backend)
    assert not out.q_action.any() and not out.value.any()
    assert same_bits(out[2:], run(case, backend)[2:])


def test_float64_heads_are_served_in_float64():
    case = score_case("policy, other alphas", 2.0, "softcap, bias and scale")
    doubles = case._replace(**{
        name: getattr(case, name).double() for name in ("adapter_hidden", "base_hidden", "weight")
    })
    out, exact = run(doubles, ""), scores.definition(case)
    for name, x, y in zip(out._fields, out, exact, strict=True):
        assert x.dtype in (torch.float64, torch.bool)
        torch.testing.assert_close(x.double(), y, atol=1e-10, rtol=1e-10, msg=name)


def test_16_bit_hidden_states_meet_a_float32_head(backend):
    case = score_case("policy", 1.0)
    rounded = case._replace(
        adapter_hidden=case.adapter_hidden.bfloat16(), base_hidden=case.base_hidden.bfloat16()
    )
    check(run(rounded, backend), rounded)


def test_chunks_change_nothing_but_rounding(backend):
    case = score_case("q", 0.5, rows=33)
    whole = run(case, backend)
    check(run(case, backend, workspace_mb=0.02), case)
    for x, y in zip(run(case, backend, workspace_mb=0.02), whole, strict=True):
        assert (error(x.float(), y.float()) < 1e-4).all()


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_results_do_not_depend_on_the_threads(threads, rows):  # noqa: F811
    base, difference = torch.randn(2, rows, 20_011)
    actions = torch.randint(20_011, (rows,))
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(dispatch.load("cpu").score_rows(
            base, difference, actions, LogitHead(), (0.5, 0.5), OBJECTIVES["q"]
        ))
    assert all(torch.equal(results[0], other) for other in results[1:])


# --- rows as they come ------------------------------------------------------------------------


def score_rows(backend, base, difference, actions=None, head=None, weights=(1.0, 0.0),
               coef=OBJECTIVES["policy"]):
    actions = torch.zeros(len(base), dtype=torch.int64) if actions is None else actions
    out = dispatch.load(backend).score_rows(
        base, difference, actions, head or LogitHead(), weights, coef
    )
    return scores.ScoreRows(*out)


TOPS = [
    ({7: 2.0}, {7: 1.0}, True), ({7: 2.0}, {8: 1.0}, False),
    ({7: 2.0, 9999: 2.0}, {9999: 4.0}, True), ({9999: 2.0}, {3: 4.0, 9999: 4.0}, True),
    ({3: 2.0, 5000: 2.0}, {4: 4.0, 5001: 4.0}, False),
    ({3: 2.0, 5000: 3.0}, {3: 4.0, 5001: 4.0}, False),
    ({3: 3.0, 5000: 2.0}, {3: 4.0, 9000: 5.0}, False), ({}, {}, True),
]
"""(b where it is not −3, z where it is not −3, whether a largest column is shared)."""


@pytest.mark.parametrize("b_values, z_values, shared", TOPS)
def test_same_top1_with_ties_near_and_far(backend, b_values, z_values, shared):
    b, z = torch.full((2, 1, 10_000), -3.0)
    for x, values in ((b, b_values), (z, z_values)):
        for column, value in values.items():
            x[0, column] = value
    assert bool(score_rows(backend, b, z - b).same_top1[0]) is shared


def test_rows_far_apart_and_strided(backend):
    wide_base, wide_difference = torch.randn(2, 5, 1500)
    base, difference = wide_base[:, 3:1034], wide_difference[:, 7:1038]
    ours = score_rows(backend, base, difference)
    packed = score_rows(backend, base.contiguous(), difference.contiguous())
    assert same_bits(ours, packed)


@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_an_offset_common_to_a_row_costs_no_digits(backend, offset):
    """Powers of two and multiples of 2⁻¹¹, so that the offset itself rounds nothing."""
    base = (torch.randn(4, 3000) * 2).mul(2**11).round().div(2**11)
    difference = torch.randn(4, 3000).mul(2**11).round().div(2**11)
    near, far = (score_rows(backend, b, difference) for b in (base, base + offset))
    for name in ("base_logprob", "policy_logprob", "kl_base_policy", "kl_policy_base"):
        torch.testing.assert_close(
            getattr(near, name), getattr(far, name), atol=2e-5, rtol=2e-6, msg=name
        )


def test_nothing_hides_a_nan(backend):
    for column in (0, 1029):
        base, difference = torch.randn(2, 3, 1030)
        base[1, column] = torch.nan
        for head in (LogitHead(), LogitHead(softcap=5.0)):
            out = score_rows(backend, base, difference, head=head)
            for name in ("value", "base_logprob", "policy_logprob", "kl_base_policy"):
                assert torch.isnan(getattr(out, name)).tolist() == [False, True, False], name


def test_softcap_of_any_size_of_logit(backend):
    """tanh from a series, from exponentials and saturated, either sign."""
    size = torch.cat([torch.logspace(-8, 3, 700), torch.tensor([0.0])])
    base = torch.cat([size, -size])[None]
    columns = torch.arange(0, base.shape[1], 61)
    rows = base.expand(len(columns), -1)
    out = score_rows(backend, rows, torch.zeros_like(rows), columns, LogitHead(softcap=30.0))
    b = 30 * torch.tanh(base[0].double() / 30)
    exact = b[columns] - b.logsumexp(0)
    assert (error(out.base_logprob, exact) < 1e-5).all()


def test_no_rows(backend):
    out = score_rows(backend, torch.empty(0, 40), torch.empty(0, 40))
    assert [x.numel() for x in out] == [0] * 8
    case = score_case(rows=4)
    empty = case._replace(
        adapter_hidden=case.adapter_hidden[:0], base_hidden=case.base_hidden[:0],
        actions=case.actions[:0],
    )
    assert [x.numel() for x in run(empty, backend)] == [0] * 8


# --- what is refused --------------------------------------------------------------------------


def test_refused_arguments():
    case = score_case()
    arguments = (case.adapter_hidden, case.base_hidden, case.weight, case.actions)
    with pytest.raises(TypeError, match=r"must be float32 or float64, got torch\.bfloat16"):
        linear_state_scores(*arguments[:2], case.weight.bfloat16(), case.actions)
    with pytest.raises(ValueError, match="adapter_hidden has shape"):
        linear_state_scores(case.adapter_hidden[:3], *arguments[1:])
    with pytest.raises(ValueError, match="actions holds 1031, outside the vocabulary"):
        linear_state_scores(*arguments[:3], torch.full_like(case.actions, 1031))
    with pytest.raises(ValueError, match="softcap must be positive, got 0"):
        linear_state_scores(*arguments, softcap=0.0)
    with pytest.raises(ValueError, match="policy_weights must be a finite number, got nan"):
        linear_state_scores(*arguments, policy_weights=(torch.nan, 0.0))


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_16_bit_products_are_refused():
    with pytest.raises(TypeError, match=r"float32 products, not torch\.bfloat16"):
        score_rows("cpu", torch.zeros(2, 8).bfloat16(), None)


def test_autocast_rounds_nothing():
    case = score_case()
    with torch.autocast("cpu", torch.bfloat16):
        check(run(case, ""), case)
