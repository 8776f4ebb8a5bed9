"""``linear_soft_value``: soft values from hidden states, every CPU backend and the definition."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import (
    COEFFICIENTS,
    CPU_BACKENDS,
    DTYPES,
    FLOAT32_EPS,
    bits,
    check_linear,
    error,
    linear_case,
    linear_definition,
    linear_eager,
    linear_ours,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st

from qadapter_kernels import (
    Coefficients,
    linear_logsumexp,
    linear_soft_value,
    reference,
    soft_value,
)

PER_ROW = ("adapter_hidden", "base_hidden", "actions", "grad_q", "grad_v")


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


def call(case, backend, hidden=None, **options):
    return linear_soft_value(
        case.adapter_hidden if hidden is None else hidden, case.base_hidden, case.weight,
        case.actions, **case.coef._asdict(), bias=case.bias, logit_scale=case.logit_scale,
        backend=backend, **options,
    )


def rows_of(case, rows):
    return case._replace(**{name: getattr(case, name)[rows] for name in PER_ROW})


def products(function) -> int:
    """Matrix products that a call runs, seen by the profiler inside the ops too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = ("aten::mm", "aten::addmm", "aten::matmul")
    return sum(row.count for row in profile.key_averages() if row.key in names)


def peak_memory(function) -> int:
    """Bytes of tensors alive at the worst moment of a call, on top of what was there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


# --- the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_equals_the_definition(backend, name, dtype, bias):
    case = linear_case(
        rows=9, vocab=515, dtype=dtype, coef=COEFFICIENTS[name], bias=bias,
        logit_scale=0.25 if bias else 1.0,
    )
    result = linear_ours(case, backend)
    assert all(x.dtype == torch.float32 for x in result[:4]) and result.grad.dtype == dtype
    check_linear(result, case)


@given(data=st.data())
def test_any_shape_coefficients_and_scale(data):
    coef = Coefficients(
        data.draw(st.sampled_from([0.0, 0.01, 1.0])), data.draw(st.floats(0.2, 4.0)),
        data.draw(st.floats(0.2, 2.0)), data.draw(st.floats(-1.0, 1.0)),
    )
    case = linear_case(
        rows=data.draw(st.integers(0, 9)), vocab=data.draw(st.integers(1, 300)),
        hidden=data.draw(st.integers(1, 70)), coef=coef, bias=data.draw(st.booleans()),
        logit_scale=data.draw(st.sampled_from([1.0, 0.1, 16.0])),
        scale=data.draw(st.sampled_from([0.1, 4.0])), seed=data.draw(st.integers(0, 99)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    for name in CPU_BACKENDS:
        check_linear(linear_ours(case, name), case)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_float64_is_exact(name):
    case = linear_case(
        rows=5, vocab=50, dtype=torch.float64, coef=COEFFICIENTS[name], bias=True, logit_scale=0.3
    )
    for x, y in zip(linear_ours(case, None), linear_definition(case), strict=True):
        assert x.dtype == torch.float64 and error(x, y).max() < 1e-11


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_float64_gradcheck(name):
    """Exact for any upstream gradient: gradcheck draws its own."""
    case = linear_case(
        rows=4, vocab=6, hidden=3, dtype=torch.float64, scale=1.0, coef=COEFFICIENTS[name],
        bias=True, logit_scale=1.7,
    )
    h = case.adapter_hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: call(case, None, h)[:2], (h,))


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_both_levels_agree(name):
    case = linear_case(dtype=torch.float64, coef=COEFFICIENTS[name])
    a, b = case.adapter_hidden @ case.weight.T, case.base_hidden @ case.weight.T
    wide = soft_value(a, b, case.actions, **case.coef._asdict(), return_statistics=True)
    narrow = call(case, None, return_statistics=True)
    for pair in zip(wide, narrow, strict=True):
        for x, y in zip(*pair, strict=True):
            assert error(x, y).max() < 1e-11


@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
], ids=str)
def test_hidden_states_and_head_of_different_dtypes(backend, dtypes):
    """The products run in the head's dtype; the gradient comes back in the hidden states'."""
    hidden, head = dtypes
    plain = linear_case(rows=6, dtype=torch.bfloat16, coef=COEFFICIENTS["policy_dial"])
    case = plain._replace(
        adapter_hidden=plain.adapter_hidden.to(hidden), base_hidden=plain.base_hidden.to(hidden),
        weight=plain.weight.to(head),
    )
    result, expected = linear_ours(case, backend), linear_ours(plain, backend)
    assert result.grad.dtype == hidden
    exact = linear_definition(plain)
    for x, y, z in zip(result, expected, exact, strict=True):
        # No worse than twice the all-bfloat16 result (and half a rounding, where that is exact).
        assert error(x, z).max() <= 2 * error(y, z).max() + 2**-9 * z.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_statistics(backend, dtype, name):
    """Root mean square over the rows within twice of what plain products in that dtype lose."""
    case = linear_case(rows=64, vocab=515, dtype=dtype, coef=COEFFICIENTS[name], scale=2.0)
    soft, statistics = call(case, backend, return_statistics=True)
    for x, y in zip(soft, call(case, backend), strict=True):
        assert error(x, y).max() < 1e-5

    def through(cast):
        a, b = (
            (cast(h) @ cast(case.weight).T).double()
            for h in (case.adapter_hidden, case.base_hidden)
        )
        return reference.soft_value(a, b, case.actions, case.coef).statistics

    exact, plain = through(lambda x: x.double()), through(lambda x: x)
    for x, y, z in zip(statistics, exact, plain, strict=True):
        lost, allowed = error(x, y).square().mean().sqrt(), error(z, y).square().mean().sqrt()
        assert lost < 2 * allowed + 16 * FLOAT32_EPS * 20


# --- day-one robustness (design §6) -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_nothing(backend, dtype):
    """A workspace for one row, for some rows, for all of them; 600 rows are three CPU chunks."""
    case = linear_case(rows=600, vocab=130, hidden=16, dtype=dtype, bias=True)
    whole = linear_ours(case, backend)
    check_linear(whole, case)
    for rows in (1.5, 7):
        parts = linear_ours(case, backend, workspace_mb=rows * 2 * 130 * dtype.itemsize / 2**20)
        for x, y in zip(parts, whole, strict=True):
            # A product of another height may add up in another order, no more: a rounding or two
            # of logits of size 16, times rows of W of size 4.
            assert error(x, y).max() <= 2 * 16 * 4 * torch.finfo(dtype).eps


def test_no_rows(backend):
    case = linear_case(rows=0)
    result = linear_ours(case, backend)
    assert [tuple(x.shape) for x in result] == [(0,)] * 4 + [(0, 48)]
    _, statistics = call(case, backend, return_statistics=True)
    assert all(x.shape == (0,) for x in statistics)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_weights(backend, dtype):
    """A head padded to a round number: cut it (a view), or give the tail a bias of −inf."""
    case = linear_case(rows=6, vocab=101, dtype=dtype, coef=COEFFICIENTS["policy_dial"], bias=True)
    padded = torch.full((128, 48), 30.0).to(dtype)
    padded[:101] = case.weight
    expected = linear_ours(case, backend)
    cut = linear_ours(case._replace(weight=padded[:101]), backend)
    assert same_bits(cut, expected)

    bias = torch.full((128,), -torch.inf, dtype=dtype)
    bias[:101] = case.bias
    excluded = linear_ours(case._replace(weight=padded, bias=bias), backend)
    for x, y in zip(excluded, expected, strict=True):
        assert error(x, y).max() <= 1e-5 + torch.finfo(x.dtype).eps * y.abs().max()


def test_minus_infinite_bias_where_the_head_weighs_negatively(backend):
    """Another dial than it was trained at can turn the base's weight negative: an excluded token
    stays excluded."""
    coef = Coefficients(0.1, 0.5, 0.5, -1.0)  # c_a + c_b + α₀ < 0
    bias = torch.zeros(130)
    bias[5:9] = -torch.inf
    case = linear_case(coef=coef)._replace(bias=bias)
    keep = torch.ones(130, dtype=torch.bool)
    keep[5:9] = False
    actions = case.actions.clamp(min=9)
    case = case._replace(actions=actions)
    result = linear_ours(case, backend)
    expected = linear_ours(
        case._replace(weight=case.weight[keep], bias=None, actions=actions - 4), backend
    )
    for x, y in zip(result, expected, strict=True):
        assert error(x, y).max() < 1e-4


def test_strided_hidden_states(backend):
    case = linear_case(rows=6)
    expected = linear_ours(case, backend)
    wide = torch.zeros(6, 3, 48)
    wide[:, 1] = case.adapter_hidden
    for change in (
        {"adapter_hidden": wide[:, 1]},
        {"adapter_hidden": case.adapter_hidden.t().contiguous().t()},
        {"base_hidden": case.base_hidden.t().contiguous().t()},
        {"weight": case.weight.t().contiguous().t()},
    ):
        for x, y in zip(linear_ours(case._replace(**change), backend), expected, strict=True):
            assert error(x, y).max() < 2e-5


@pytest.mark.parametrize("used", ["q_action", "value"])
def test_missing_upstream_gradients(backend, used):
    case = linear_case(rows=5)
    h = case.adapter_hidden.requires_grad_()
    weight = case.grad_q if used == "q_action" else case.grad_v
    (getattr(call(case, backend, h), used) * weight).sum().backward()
    zero = torch.zeros(5)
    expected = linear_definition(case._replace(
        grad_q=weight if used == "q_action" else zero, grad_v=weight if used == "value" else zero
    ))
    assert error(h.grad, expected.grad).max() < 1e-4


@pytest.mark.parametrize("kind", ["stride_0", "zero", "negative", "non_contiguous", "large"])
def test_upstream_gradients_of_every_kind(backend, kind):
    case = linear_case(rows=6)
    g, v = {
        "stride_0": (torch.ones(()).expand(6), torch.full((), 0.5).expand(6)),
        "zero": (torch.zeros(6), torch.zeros(6)),
        "negative": (-case.grad_q.abs(), -case.grad_v.abs()),
        "non_contiguous": (torch.randn(12)[::2], torch.randn(6, 3)[:, 1]),
        "large": (1e20 * case.grad_q, 1e20 * case.grad_v),
    }[kind]
    case = case._replace(grad_q=g, grad_v=v)
    result = linear_ours(case, backend)
    check_linear(result, case)
    if kind == "zero":
        assert not result.grad.any()


def test_masked_rows(backend):
    """NaN in a masked row's hidden states and upstream gradients reaches nothing."""
    case = linear_case(rows=6, dtype=torch.bfloat16)
    mask = torch.tensor([True, False, True, True, False, True])
    poisoned = case._replace(**{name: getattr(case, name).clone() for name in PER_ROW})
    for name in ("adapter_hidden", "base_hidden", "grad_q", "grad_v"):
        getattr(poisoned, name)[~mask] = torch.nan
    result = linear_ours(poisoned, backend, row_mask=mask)
    expected = linear_ours(case, backend)
    for x, y in zip(result, expected, strict=True):
        assert not x[~mask].any()
        assert torch.equal(bits(x[mask]), bits(y[mask]))


def test_cached_base_logsumexp(backend):
    for name in ("policy", "q"):
        case = linear_case(rows=6, coef=COEFFICIENTS[name], dtype=torch.bfloat16)
        plain = linear_ours(case, backend)
        cached = linear_ours(case, backend, base_logsumexp=plain.base_logsumexp)
        for field in ("q_action", "value", "base_logprob", "base_logsumexp", "grad"):
            assert error(getattr(cached, field), getattr(plain, field)).max() < 1e-5, (name, field)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_logsumexp_is_what_linear_soft_value_computes(backend, dtype):
    case = linear_case(rows=9, dtype=dtype, bias=True, logit_scale=0.5, scale=12.0)
    lse = linear_logsumexp(
        case.base_hidden, case.weight, case.actions, bias=case.bias, logit_scale=0.5,
        backend=backend,
    )
    soft = call(case, backend)
    assert error(lse, soft.base_logsumexp).max() < 1e-5
    assert (call(case, backend, base_logsumexp=lse).base_logprob <= 0).all()
    without = linear_logsumexp(
        case.base_hidden, case.weight, bias=case.bias, logit_scale=0.5, backend=backend
    )
    logits = 0.5 * (case.base_hidden.double() @ case.weight.double().T + case.bias.double())
    rounding = torch.finfo(dtype).eps * logits.abs().max()
    assert error(without, logits.logsumexp(-1)).max() <= rounding


def test_repeated_and_out_of_order_backward(backend):
    cases = [linear_case(rows=4, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    leaves = [case.adapter_hidden.clone().requires_grad_() for case in cases]
    losses = [
        (out.q_action * case.grad_q + out.value * case.grad_v).sum()
        for case, leaf in zip(cases, leaves, strict=True)
        for out in [call(case, backend, leaf)]
    ]
    expected = [linear_ours(case, backend).grad for case in cases]
    for i in (2, 0, 1):
        losses[i].backward(retain_graph=True)
    losses[0].backward()
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, expected[i] * (2 if i == 0 else 1))


def test_no_grad_computes_no_gradient_product(backend):
    """One product a stream; the gradient's only when somebody will ask for it; backward runs
    none."""
    case = linear_case(rows=6)
    leaf = case.adapter_hidden.clone().requires_grad_()
    lse = call(case, backend).base_logsumexp
    assert products(lambda: call(case, backend)) == 2  # nothing requires a gradient
    assert products(lambda: call(case, backend, leaf)) == 3
    assert products(lambda: call(case, backend, leaf, base_logsumexp=lse)) == 2
    with torch.no_grad():
        out = call(case, backend, leaf)
        assert not any(x.requires_grad for x in out)
        assert products(lambda: call(case, backend, leaf)) == 2
        assert products(lambda: call(case, backend, leaf, base_logsumexp=lse)) == 1
    with torch.inference_mode():
        assert same_bits(call(case, backend), out)
    value = call(case, backend, leaf).value.sum()
    assert products(value.backward) == 0


def test_the_head_gets_no_gradient_and_is_not_kept_twice(backend):
    case = linear_case(rows=6)
    weight = case.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight requires grad"):
        call(case, backend, case.adapter_hidden)
    with torch.no_grad():
        call(case._replace(weight=weight), backend)


def test_memory_stays_below_one_logits_tensor(backend):
    """4,096 rows of 2,048 columns would be 32 MiB in float32 and 16 MiB in bfloat16, twice for two
    streams. What is held: chunks of 256 rows (2 MiB for two streams in bfloat16, a few float32
    copies of 2 MiB each in the torch backend) and G′ (0.25 MiB)."""
    case = linear_case(rows=4096, vocab=2048, hidden=32, dtype=torch.bfloat16)
    leaf = case.adapter_hidden.clone().requires_grad_()

    def step():
        call(case, backend, leaf).value.sum().backward()

    def plain():
        linear_eager(case)

    assert peak_memory(plain) > 64 << 20  # the yardstick sees what it should
    assert peak_memory(step) < 16 << 20


def test_autocast(backend):
    """float32 hidden states under bfloat16 autocast: a bfloat16 head, the gradient in float32."""
    case = linear_case(rows=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_ours(case, backend)
    expected = linear_ours(case._replace(weight=case.weight.bfloat16()), backend)
    assert result.grad.dtype == torch.float32
    assert same_bits(result, expected)


def test_deterministic_to_the_bit(backend):
    case = linear_case(rows=300, dtype=torch.bfloat16)
    first = linear_ours(case, backend)
    assert all(same_bits(linear_ours(case, backend), first) for _ in range(3))


def test_float16_does_not_overflow(backend):
    """The policy's logits reach 10⁵ and more through a small α̃, where the streams' stay within
    float16: α̃ is applied after the product, in float32."""
    coef = Coefficients(1.0, 0.01, 1.0, -1.0)
    case = linear_case(rows=64, hidden=16, dtype=torch.float16, coef=coef)
    case = case._replace(
        adapter_hidden=case.adapter_hidden * 500, base_hidden=case.base_hidden * 500,
        weight=case.weight / 10,
    )
    result = linear_ours(case, backend)
    assert all(torch.isfinite(x).all() for x in result)
    policy_logits = 100 * case.adapter_hidden.double() @ case.weight.double().T
    assert policy_logits.abs().max() > torch.finfo(torch.float16).max
    check_linear(result, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["policy", "q"])
def test_peaked_rows_in_16_bits(backend, dtype, name):
    """Where the policy is sure, r = q − V cancels: a 16-bit logit's rounding at the action must
    not be left over in it. The rest of the row has a probability of e⁻¹² at most, so that what its
    rounding changes is below 1e-4."""
    case = linear_case(rows=8, dtype=dtype, coef=COEFFICIENTS[name], scale=0.5)
    actions = torch.randint(130, (8,))
    head = case.weight.float()[actions]
    peaked = (head / head.square().sum(-1, keepdim=True) * 23.3).to(dtype)
    case = case._replace(adapter_hidden=peaked, base_hidden=peaked, actions=actions)
    case = case._replace(grad_v=-case.grad_q)
    result, exact = linear_ours(case, backend), linear_definition(case)
    assert (exact.base_logprob > -0.01).all()  # peaked indeed
    reward, exact_reward = (x.q_action - x.value for x in (result, exact))
    assert error(reward, exact_reward).max() < 1e-4
    assert error(result.base_logprob, exact.base_logprob).max() < 1e-4
    # g + v = 0: the gradient is v·(Σ p W − W[a]), a difference of rows that nearly cancels.
    check_linear(result, case)


def test_rows_without_support_give_no_nan(backend):
    """A bias of −inf everywhere leaves no token: V = −inf, and numbers for all the rest."""
    case = linear_case(rows=4)._replace(bias=torch.full((130,), -torch.inf))
    result = linear_ours(case, backend)
    assert (result.value == -torch.inf).all()
    assert not any(x.isnan().any() for x in result)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only")
def test_the_workspace_asks_for_huge_pages():
    from qadapter_kernels.native import HUGE_PAGE, prefer_huge_pages

    x = prefer_huge_pages(torch.empty(4 * HUGE_PAGE, dtype=torch.uint8))
    inside, flags = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, *values = line.split()
        if "-" in field and not field.endswith(":"):
            begin, end = (int(number, 16) for number in field.split("-"))
        elif field == "VmFlags:" and begin <= inside < end:
            flags = values
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without huge pages")
    assert "hg" in flags
    prefer_huge_pages(torch.empty(0))  # too small to hold one: nothing happens


def test_the_kept_workspace_serves_every_size_mode_and_thread(backend):
    cases = [
        linear_case(rows=rows, vocab=vocab, dtype=torch.bfloat16, coef=COEFFICIENTS["policy"])
        for rows, vocab in ((40, 900), (3, 70), (17, 400))
    ]
    expected = [linear_ours(case, backend) for case in cases]
    with torch.inference_mode():
        call(linear_case(rows=50, vocab=1000, dtype=torch.float32), backend)  # the largest yet
    for case, result in zip(cases, expected, strict=True):
        assert same_bits(linear_ours(case, backend), result)
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(10):
            results = pool.map(lambda case: linear_ours(case, backend), cases)
            assert all(same_bits(*pair) for pair in zip(results, expected, strict=True))
