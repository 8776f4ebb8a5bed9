"""The compiled CPU backend, function by function, for every instruction set this machine has."""

from __future__ import annotations

import pytest
import torch
from cases import (
    COEFFICIENTS,
    DTYPES,
    FLOAT32_EPS,
    Result,
    bits,
    check_logits,
    definition,
    error,
    logits_case,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st

from qadapter_kernels import Coefficients, cpu_backend, native, reference, torch_backend

INF = torch.inf
UNAVAILABLE = cpu_backend.unavailable_reason("cpu")
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def _instruction_sets() -> list[str]:
    found = []
    for name in ("portable", "avx2", "avx512") if UNAVAILABLE is None else ():
        try:
            cpu_backend.select_instruction_set(name)
        except ValueError:
            continue
        found.append(name)
    if found:
        cpu_backend.select_instruction_set("best")
    return found


@pytest.fixture(params=_instruction_sets())
def isa(request):
    cpu_backend.select_instruction_set(request.param)
    yield request.param
    cpu_backend.select_instruction_set("best")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _forward(case, base_lse=None, statistics=False):
    return cpu_backend.logits_forward(
        case.adapter_logits, case.base_logits, case.actions, case.coef, base_lse, statistics
    )


def _run(case, out=None) -> Result:
    q, value, logprob, base_lse, normalizer, _ = _forward(case)
    out = torch.empty_like(case.adapter_logits) if out is None else out
    cpu_backend.logits_backward(
        case.adapter_logits, case.base_logits, case.actions, normalizer, case.grad_q, case.grad_v,
        case.coef, out,
    )
    return Result(q, value, logprob, base_lse, out)


def _definition64(case, base_lse=None):
    return torch_backend.logits_forward(
        case.adapter_logits.double(), case.base_logits.double(), case.actions, case.coef,
        None if base_lse is None else base_lse.double(), True,
    )


# --- the exponential --------------------------------------------------------------------------


def _exp(x):
    out = torch.empty_like(x)
    native.library("cpu").qadapter_cpu_exp(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def test_exp_is_within_1_1_ulp(isa):
    x = torch.cat([torch.linspace(-87.3, 88.7, 1_000_003), torch.linspace(-1e-3, 1e-3, 10_001)])
    exact = x.double().exp()
    ulp = 2.0 ** (exact.log2().floor() - 23)
    assert ((_exp(x) - exact).abs() / ulp).max() < 1.1


def test_exp_at_the_ends(isa):
    x = torch.tensor([0.0, -INF, INF, 89.5, -104.5, torch.nan, -87.4, -95.0, -103.0])
    out = _exp(x)
    assert out[:5].tolist() == [1.0, 0.0, INF, INF, 0.0]
    assert out[5].isnan()
    # Gradual underflow: half a unit of the smallest subnormal, and one more for two roundings.
    assert error(out[6:], x[6:].double().exp()).max() < 1.5 * 2.0**-149


# --- 16-bit conversions: a row of one column has lse(u) = u and softmax 1 -----------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_logit_is_read_exactly(isa, dtype):
    x = torch.arange(2**16).to(torch.int32).sub(2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()][:, None]
    actions = torch.full((len(x),), -1)
    lse, _, _ = cpu_backend.rows_forward(
        x, None, actions, 1.0, None, 1.0, None, False, dtype, False
    )
    assert torch.equal(lse, x[:, 0].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_rounded_to_nearest_even(isa, dtype):
    ties = torch.arange(2**16).to(torch.int64).mul(2**15).to(torch.int32).view(torch.float32)
    near_ties = torch.cat([ties.view(torch.int32) - 1, ties.view(torch.int32) + 1])
    subnormal = torch.arange(4097) * 2.0**-25
    special = torch.tensor([INF, -INF, 65519.99, 65520.0, 3.4e38])
    v = torch.cat([ties, near_ties.view(torch.float32), subnormal, special, torch.randn(1000)])
    v = torch.cat([v, -v])
    logits, count = torch.zeros(len(v), 1, dtype=dtype), len(v)
    out = torch.empty_like(logits)
    cpu_backend.logits_backward(
        logits, logits, torch.full((count,), -1), torch.tensor([[0.0], [1.0]]).repeat(1, count),
        torch.zeros(count), v, Coefficients(0.0), out,
    )
    assert torch.equal(out[:, 0].nan_to_num(nan=0.125), v.to(dtype).nan_to_num(nan=0.125))
    assert torch.equal(out[:, 0].isnan(), v.isnan())


# --- logits level -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_level_matches_float64(isa, dtype, name):
    case = logits_case(rows=5, vocab=8192 + 333, dtype=dtype, coef=COEFFICIENTS[name])
    check_logits(_run(case), case)


@pytest.mark.parametrize("vocab", [1, 3, 7, 8, 15, 16, 17, 63, 1023, 1024, 1025, 8191, 8192, 8193])
def test_block_and_vector_boundaries(isa, vocab):
    case = logits_case(rows=4, vocab=vocab, dtype=torch.bfloat16)
    check_logits(_run(case), case)


@given(
    rows=st.integers(1, 4), vocab=st.integers(1, 70), scale=st.sampled_from([0.01, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES), name=st.sampled_from(sorted(COEFFICIENTS)),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_scale(rows, vocab, scale, dtype, name, seed):
    case = logits_case(rows, vocab, dtype, scale, COEFFICIENTS[name], seed)
    check_logits(_run(case), case)


def test_row_strides_are_respected(isa):
    case = logits_case(rows=6, vocab=1500, dtype=torch.bfloat16)
    wide = torch.full((12, 1600), torch.nan, dtype=torch.bfloat16)
    a, b = wide[::2, 3:1503], wide[1::2, 50:1550]
    a.copy_(case.adapter_logits), b.copy_(case.base_logits)
    out = torch.full((6, 1700), 7.0, dtype=torch.bfloat16)
    strided = case._replace(adapter_logits=a, base_logits=b)
    assert same_bits(_run(strided, out[:, 100:1600]), _run(case))
    assert (out[:, :100] == 7).all() and (out[:, 1600:] == 7).all()


def test_backward_in_place_and_between_dtypes(isa):
    case = logits_case(rows=5, vocab=2077, dtype=torch.float32)
    expected = _run(case).grad
    logits = case.adapter_logits.clone()
    assert torch.equal(_run(case._replace(adapter_logits=logits), out=logits).grad, expected)
    narrow = _run(case, out=torch.empty(5, 2077, dtype=torch.bfloat16)).grad
    assert torch.equal(narrow, expected.bfloat16())
    mixed = case._replace(base_logits=case.base_logits.bfloat16())
    check_logits(_run(mixed), mixed)


def test_given_base_logsumexp_is_used_and_the_base_not_read():
    case = logits_case(rows=4, vocab=3000, coef=COEFFICIENTS["policy"])
    base_lse = case.base_logits.logsumexp(-1) + 1.0
    exact = _definition64(case, base_lse)
    case.base_logits[:, :-1][:, ::2] = torch.nan  # weight 0 in u, and lse(b) is given
    keep = ~case.base_logits.gather(1, case.actions.clamp_min(0)[:, None])[:, 0].isnan()
    out = _forward(case, base_lse)
    for i in (1, 3, 4):
        assert error(out[i], exact[i]).max() < 1e-5
    assert error(out[2][keep], exact[2][keep]).max() < 1e-5


def test_masked_rows_and_rows_without_action(isa):
    case = logits_case(rows=5, vocab=2000)
    actions = torch.tensor([-2, 0, -1, -2, 1999])
    case.adapter_logits[0] = torch.nan
    case.base_logits[0] = torch.nan
    case = case._replace(actions=actions)
    outputs = _forward(case, statistics=True)
    for x in outputs:
        assert (x.reshape(-1, 5)[:, [0, 3]] == 0).all()
    assert outputs[0][2] == outputs[2][2] == 0 and outputs[1][2] != 0
    grad = torch.full_like(case.adapter_logits, torch.nan)
    case = case._replace(grad_q=torch.tensor([torch.nan, 1, torch.nan, torch.nan, 1.0]))
    cpu_backend.logits_backward(
        *case[:3], outputs[4], case.grad_q, case.grad_v, case.coef, grad
    )
    assert (grad[[0, 3]] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity(isa, dtype, name):
    """Excluded columns in one stream or both, an excluded action, whole rows of -inf."""
    coef = COEFFICIENTS[name]
    case = logits_case(rows=7, vocab=2500, dtype=dtype, coef=coef)
    a, b = case.adapter_logits, case.base_logits
    a[0, :1100] = -INF  # longer than a block
    b[1, 5:2400] = -INF
    a[2, ::2] = -INF
    b[2, ::3] = -INF
    a[3, case.actions[3]] = b[3, case.actions[3]] = -INF
    a[4] = -INF
    b[5] = -INF
    a[6] = b[6] = -INF
    exact = _definition64(case)
    outputs = _forward(case, statistics=True)
    size = 40 * max(1.0, 1 / coef.alpha_tilde)
    for i, (x, y) in enumerate(zip(outputs, exact, strict=True)):
        if i == 2:  # log π of an action in a row of -inf: -inf here
            x, y = x[:5], y[:5]
        if i == 5:  # whole rows of -inf have no distribution to compare
            x, y = x[:, :4], y[:, :4]
        assert error(x, y).max() < 32 * FLOAT32_EPS * size, (i, x, y)
    grad = torch.full_like(a, torch.nan)
    cpu_backend.logits_backward(*case[:3], outputs[4], case.grad_q, case.grad_v, coef, grad)
    exact_grad = torch.empty_like(a, dtype=torch.float64)
    torch_backend.logits_backward(
        a.double(), b.double(), case.actions, exact[4], case.grad_q.double(), case.grad_v.double(),
        coef, exact_grad,
    )
    allowed = 1e-4 + torch.finfo(dtype).eps * exact_grad.abs()
    assert (error(grad, exact_grad) <= allowed).all()
    assert (grad[outputs[4][1] == 0] == 0).all()


def test_large_common_offsets_lose_nothing(isa):
    """Multiples of 1/8, so that float32 holds the shifted logits exactly."""
    case = logits_case(rows=5, vocab=3000)
    case = case._replace(
        adapter_logits=(case.adapter_logits * 8).round() / 8,
        base_logits=(case.base_logits * 8).round() / 8,
    )
    shifted = case._replace(
        adapter_logits=case.adapter_logits + 2**17, base_logits=case.base_logits - 2**17
    )
    plain, moved = _forward(case, statistics=True), _forward(shifted, statistics=True)
    assert torch.equal(plain[2], moved[2])
    coef = COEFFICIENTS["policy"]
    plain, moved = (_forward(x._replace(coef=coef), statistics=True) for x in (case, shifted))
    assert torch.equal(plain[5], moved[5])


def test_nan_is_not_hidden(isa):
    case = logits_case(rows=2, vocab=3000)
    case.adapter_logits[0, 1500] = torch.nan
    outputs = _forward(case)
    assert outputs[1][0].isnan() and outputs[4][1, 0].isnan() and outputs[1][1].isfinite()


def test_action_out_of_range_is_an_error():
    case = logits_case(rows=3, vocab=10)
    with pytest.raises(ValueError, match=r"outside -2 \.\. 9"):
        _forward(case._replace(actions=torch.tensor([0, 10, 1])))


# --- statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_match_float64(isa, dtype):
    case = logits_case(rows=4, vocab=9001, dtype=dtype, scale=3.0, coef=COEFFICIENTS["policy"])
    stats, exact = _forward(case, statistics=True)[5], _definition64(case)[5]
    # Sums of float32 terms of the size of the logits, some hundred of them in one accumulator.
    assert error(stats, exact).max() < 64 * FLOAT32_EPS * 15


def test_divergences_vanish_exactly_at_the_base(isa):
    case = logits_case(rows=3, vocab=9001, coef=COEFFICIENTS["policy"])
    case = case._replace(base_logits=case.adapter_logits)
    assert (_forward(case, statistics=True)[5][1:] == 0).all()


# --- hidden level -----------------------------------------------------------------------------


def _rows64(z, zb, actions, scale, bias, base_scale, base_bias, exact=None):
    """(policy_lse, base_lse, residual) by the definition in float64."""
    u, b = scale * z.double(), base_scale * zb.double()
    u = u + (0 if bias is None else bias.double())
    b = b + (0 if base_bias is None else base_bias.double())
    for i, action in enumerate(actions.tolist()):
        if exact is not None and action >= 0:
            u[i, action], b[i, action] = exact[:, i].double()
    residual = u.softmax(-1)
    for i, action in enumerate(actions.tolist()):
        if action >= 0:
            residual[i, action] -= 1
    masked = actions == -2
    return (
        u.logsumexp(-1).masked_fill(masked, 0), b.logsumexp(-1).masked_fill(masked, 0),
        residual.masked_fill(masked[:, None], 0), reference.policy_statistics(u, b),
    )


@pytest.mark.parametrize("exact_action", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_rows_forward_matches_float64(isa, dtype, residual_dtype, bias, exact_action):
    rows, vocab = 5, 8192 + 2000 + 5
    case = logits_case(rows, vocab, dtype)
    actions = torch.tensor([vocab - 1, -1, -2, 0, 1024])
    biases = (torch.randn(vocab), torch.randn(vocab)) if bias else (None, None)
    exact = 4 * torch.randn(2, rows) if exact_action else None
    expected = _rows64(
        case.adapter_logits, case.base_logits, actions, 0.7, biases[0], 1.3, biases[1], exact
    )
    padded = torch.full((rows, vocab + 9), 5.0, dtype=dtype)  # rows stand apart
    z = padded[:, :vocab]
    z.copy_(case.adapter_logits)
    policy_lse, base_lse, stats = cpu_backend.rows_forward(
        z, case.base_logits, actions, 0.7, biases[0], 1.3, biases[1], True, residual_dtype, True,
        exact,
    )
    assert error(policy_lse, expected[0]).max() < 4 * FLOAT32_EPS * 20
    assert error(base_lse, expected[1]).max() < 4 * FLOAT32_EPS * 20
    keep = actions != -2
    assert error(stats[:, keep], torch.stack(expected[3])[:, keep]).max() < 64 * FLOAT32_EPS * 20
    assert (stats[:, ~keep] == 0).all()
    residual = torch_backend.residual_view(padded, residual_dtype)[:, :vocab]
    # One rounding to the residual's dtype, on top of what float32 loses in exp(u - lse).
    own = torch.finfo(residual_dtype)
    allowed = (own.eps / 2 + 8e-6) * expected[2].abs() + own.smallest_normal * own.eps
    assert (error(residual, expected[2]) <= allowed + FLOAT32_EPS).all()
    assert (padded[:, vocab:] == 5).all()


def test_rows_forward_can_only_look(isa):
    case = logits_case(rows=4, vocab=3001, dtype=torch.bfloat16)
    z = case.adapter_logits.clone()
    policy_lse, base_lse, stats = cpu_backend.rows_forward(
        z, None, case.actions, 1.0, None, 1.0, None, False, torch.bfloat16, False
    )
    assert same_bits([z], [case.adapter_logits]) and base_lse.numel() == stats.numel() == 0
    assert error(policy_lse, z.double().logsumexp(-1)).max() < 1e-5


def test_rows_without_support_leave_a_zero_residual(isa):
    z = torch.full((2, 1500), -INF)
    z[1, 3] = 2.0
    lse, _, _ = cpu_backend.rows_forward(
        z, None, torch.tensor([0, 7]), 1.0, None, 1.0, None, True, torch.float32, False
    )
    assert lse.tolist() == [-INF, 2.0]
    expected = torch.zeros(2, 1500)
    expected[1, 3], expected[1, 7] = 1.0, -1.0
    assert torch.equal(z, expected)


def test_rows_forward_refuses_what_it_cannot_do():
    z, actions = torch.zeros(1, 8, dtype=torch.bfloat16), torch.tensor([0])
    with pytest.raises(TypeError, match="can't be written over"):
        cpu_backend.rows_forward(z, None, actions, 1.0, None, 1.0, None, True, torch.float32, False)
    with pytest.raises(ValueError, match="zb_RV is needed"):
        cpu_backend.rows_forward(z, None, actions, 1.0, None, 1.0, None, False, z.dtype, True)
    with pytest.raises(TypeError, match="float64"):
        cpu_backend.rows_forward(
            z.double(), None, actions, 1.0, None, 1.0, None, False, z.dtype, False
        )
    with pytest.raises(ValueError, match="contiguous columns"):
        cpu_backend.rows_forward(
            z.expand(8, 8).t(), None, actions.expand(8), 1.0, None, 1.0, None, False, z.dtype, False
        )


# --- threads, sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 11])
def test_results_do_not_depend_on_the_threads(threads, rows):
    """Few rows are split over threads, many are not: the same bits either way."""
    case = logits_case(rows, 20_011, torch.bfloat16)
    strength = torch.linspace(0, 2, rows)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        outputs = [*_forward(case, statistics=True), *_run(case)]
        for dtype, residual in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
            z = case.adapter_logits.to(dtype, copy=True)
            outputs += cpu_backend.rows_forward(
                z, case.base_logits, case.actions, 0.5, None, 1.0, None, True, residual, True
            )
            outputs.append(torch_backend.residual_view(z, residual))
        outputs.append(
            cpu_backend.combine_logits(case.adapter_logits, case.base_logits, case.coef, strength)
        )
        results.append(outputs)
    assert all(same_bits(results[0], other) for other in results[1:])


def test_a_narrower_residual_never_overtakes_the_reads(threads):
    """bf16 over float32: the first half of the row's bytes holds columns that others still read."""
    threads(2)
    for seed in range(5):
        z = logits_case(1, 400_003, seed=seed).adapter_logits
        exact = z.double().softmax(-1)
        cpu_backend.rows_forward(
            z, None, torch.tensor([-1]), 1.0, None, 1.0, None, True, torch.bfloat16, False
        )
        residual = torch_backend.residual_view(z, torch.bfloat16)
        assert (error(residual, exact) <= 2.0**-8 * exact + 1e-12).all()


def test_a_row_has_the_same_bits_alone_and_in_a_batch(threads):
    threads(2)
    case = logits_case(9, 20_011, torch.bfloat16)
    together = _run(case)
    for i in (0, 5):
        alone = _run(type(case)(*(x[i : i + 1] for x in case[:5]), case.coef))
        assert same_bits(alone, [x[i : i + 1] for x in together])


def test_no_rows(threads):
    threads(2)
    case = logits_case(rows=0, vocab=20)
    assert [x.numel() for x in _forward(case, statistics=True)] == [0] * 6
    assert _run(case).grad.shape == (0, 20)
    empty = torch.empty(0, 20)
    out = cpu_backend.rows_forward(
        empty, empty, case.actions, 1.0, None, 1.0, None, True, torch.float32, False
    )
    assert [x.numel() for x in out] == [0, 0, 0]
    assert cpu_backend.combine_logits(empty, empty, case.coef, None).shape == (0, 20)


def test_offsets_beyond_2_to_the_31_elements():
    """Three rows of a matrix whose last starts beyond 2³¹ elements; only touched pages exist."""
    case = logits_case(rows=3, vocab=100, dtype=torch.bfloat16)
    stride = 2**30 + 64
    far = torch.empty(2 * stride + 100, dtype=torch.bfloat16).as_strided((3, 100), (stride, 1))
    far.copy_(case.adapter_logits)
    expected = _run(case)
    assert same_bits(_run(case._replace(adapter_logits=far), out=far), expected)


# --- sequence loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("bootstrap", ["next", "current"])
def test_bradley_terry_matches_the_definition(bootstrap, gamma):
    offsets = torch.tensor([0, 3, 3, 4, 9, 10, 16])  # one sequence is empty, some have one action
    rows, sequences = 16, 6
    q, v = 2 * torch.randn(rows), 2 * torch.randn(rows)
    divisors = torch.tensor([3.0, 1.0, 1.0, 5.0, 1.0, 6.0])
    inv_pairs, inv_actions, chi2_coef = 1 / 3, 1 / 16, 0.3
    grads = [torch.randn(3), torch.randn(sequences), torch.randn(rows)]

    q64, v64 = (x.double().requires_grad_() for x in (q, v))
    *losses, sequence_rewards, token_rewards = reference.bradley_terry(
        q64, v64, offsets, gamma=gamma, chi2_coef=chi2_coef, bootstrap=bootstrap,
        divisors=divisors.double(), num_pairs=1 / inv_pairs, num_actions=1 / inv_actions,
    )
    expected = [torch.stack(losses), sequence_rewards, token_rewards]
    total = sum((x * g).sum() for x, g in zip(expected, grads, strict=True))
    grad_q64, grad_v64 = torch.autograd.grad(total, (q64, v64), allow_unused=True)
    grad_v64 = torch.zeros(rows) if grad_v64 is None else grad_v64

    options = (gamma, chi2_coef, bootstrap == "next", inv_pairs, inv_actions)
    ours = cpu_backend.bradley_terry_forward(q, v, offsets, divisors, *options)
    grad_q, grad_v = cpu_backend.bradley_terry_backward(
        ours[2], ours[1], offsets, divisors, *options, *grads
    )
    for x, y in zip([*ours, grad_q, grad_v], [*expected, grad_q64, grad_v64], strict=True):
        assert error(x, y.detach()).max() < 16 * FLOAT32_EPS * (1 + float(y.detach().abs().max()))


def test_bradley_terry_of_nothing_and_of_extreme_margins():
    nothing = torch.zeros(0)
    options = (1.0, 0.1, True, 1.0, 1.0)
    losses, *_ = cpu_backend.bradley_terry_forward(
        nothing, nothing, torch.tensor([0]), nothing, *options
    )
    assert losses.tolist() == [0, 0, 0]
    q, offsets, ones = torch.tensor([-500.0, 500.0]), torch.tensor([0, 1, 2]), torch.ones(2)
    losses, sequence, token = cpu_backend.bradley_terry_forward(q, q, offsets, ones, *options)
    assert losses[1] == 1000
    grad_q, _ = cpu_backend.bradley_terry_backward(
        token, sequence, offsets, ones, *options, torch.tensor([0.0, 1.0, 0.0]),
        torch.zeros(2), torch.zeros(2),
    )
    assert grad_q.tolist() == [-1.0, 1.0]


# --- decoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_logits_matches_float64(isa, dtype, name):
    coef = COEFFICIENTS[name]
    case = logits_case(rows=6, vocab=2999, dtype=dtype, coef=coef)
    case.adapter_logits[1, ::3] = -INF
    case.base_logits[2, ::5] = -INF
    for strength in (None, torch.tensor([0.0, 1.0, 0.5, 2.0, -1.0, 1.5])):
        ours = cpu_backend.combine_logits(case.adapter_logits, case.base_logits, coef, strength)
        exact = torch_backend.combine_logits(
            case.adapter_logits.double(), case.base_logits.double(), coef,
            None if strength is None else strength.double(),
        )
        assert ours.dtype == torch.float32
        assert error(ours, exact).max() < 16 * FLOAT32_EPS * (40 / min(1.0, coef.alpha_tilde))


def test_combine_logits_excludes_what_the_base_excludes_even_at_weight_zero():
    """w = 1/2 with c_b + α₀ = -α̃: the base's weight in the mixture cancels."""
    coef = Coefficients(0.0, 1.0, 1.0, -1.0)
    a, b = torch.zeros(1, 4), torch.zeros(1, 4)
    b[0, 1] = -INF
    out = cpu_backend.combine_logits(a, b, coef, torch.tensor([0.5]))
    assert out[0, 1] == -INF and error(out[0, 0], torch.tensor(1 / 3).log()) < 1e-6


# --- loading ----------------------------------------------------------------------------------


def test_serves_cpu_tensors_only():
    assert cpu_backend.unavailable_reason("cpu") is None
    assert "not cuda" in cpu_backend.unavailable_reason("cuda")


def test_unknown_instruction_set_is_an_error():
    with pytest.raises(ValueError, match="no kernels for instruction set 'vector'"):
        cpu_backend.select_instruction_set("vector")
    assert native.instruction_set() == _instruction_sets()[-1]


def test_one_openmp_runtime():
    """Ours and torch's are one: two would fight for the cores."""
    native.library("cpu")
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(runtimes) == 1


def test_definition_helper_agrees_with_autograd():
    """The float64 backend used above as the truth is the definition."""
    case = logits_case(rows=4, vocab=50)
    exact = definition(case)
    for x, y in zip(exact[:4], _definition64(case)[:4], strict=True):
        assert error(x, y).max() < 1e-12
    assert not bits(exact.grad).eq(0).all()
