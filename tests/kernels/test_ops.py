"""``soft_value``: every backend that serves the CPU against the definition, and the hostile cases
of design §6 by name."""

from __future__ import annotations

import pytest
import torch
from cases import (
    COEFFICIENTS,
    CPU_BACKENDS,
    DTYPES,
    FLOAT32_EPS,
    Result,
    check_logits,
    definition,
    error,
    logits_case,
    ours,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st

from qadapter_kernels import Coefficients, reference, soft_value

INF = torch.inf


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


def call(case, backend, adapter_logits=None, **options):
    """(q_action, value, base_logprob, base_logsumexp) of a case."""
    a = case.adapter_logits if adapter_logits is None else adapter_logits
    return soft_value(
        a, case.base_logits, case.actions, **case.coef._asdict(), backend=backend, **options
    )


# --- the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_equals_the_definition(backend, dtype, name):
    case = logits_case(rows=9, vocab=515, dtype=dtype, coef=COEFFICIENTS[name])
    result = ours(case, backend)
    assert all(x.dtype == torch.float32 for x in result[:4]) and result.grad.dtype == dtype
    check_logits(result, case)


@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1023, 4099])
def test_odd_vocabularies(backend, vocab):
    for dtype in (torch.float32, torch.bfloat16):
        case = logits_case(rows=3, vocab=vocab, dtype=dtype, coef=COEFFICIENTS["policy_dial"])
        check_logits(ours(case, backend), case)


@given(data=st.data())
def test_any_shape_coefficients_and_scale(data):
    coef = Coefficients(
        data.draw(st.sampled_from([0.0, 0.01, 1.0, 3.0])), data.draw(st.floats(0.05, 4.0)),
        data.draw(st.floats(0.05, 2.0)), data.draw(st.floats(-2.0, 1.0)),
    )
    case = logits_case(
        rows=data.draw(st.integers(0, 9)), vocab=data.draw(st.integers(1, 300)), coef=coef,
        scale=data.draw(st.sampled_from([1e-3, 1.0, 30.0])), seed=data.draw(st.integers(0, 99)),
        dtype=data.draw(st.sampled_from(DTYPES)),
    )
    for name in CPU_BACKENDS:
        check_logits(ours(case, name), case)


def test_float64_is_exact():
    case = logits_case(rows=4, vocab=50, dtype=torch.float64, coef=COEFFICIENTS["policy_dial"])
    for backend in (None, "torch"):
        result, exact = ours(case, backend), definition(case)
        for x, y in zip(result, exact, strict=True):
            assert x.dtype == torch.float64 and error(x, y).max() < 1e-12


def test_float64_gradcheck():
    case = logits_case(rows=4, vocab=5, dtype=torch.float64, scale=1.0)
    a = case.adapter_logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: call(case, None, a)[:2], (a,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_statistics(backend, dtype, name):
    """Entropy and both divergences, to a few roundings of the logits they are made of."""
    case = logits_case(rows=6, vocab=515, dtype=dtype, coef=COEFFICIENTS[name], scale=2.0)
    soft, statistics = call(case, backend, return_statistics=True)
    for x, y in zip(soft, call(case, backend), strict=True):
        assert error(x, y).max() < 1e-5
    exact = reference.soft_value(
        case.adapter_logits.double(), case.base_logits.double(), case.actions, case.coef
    ).statistics
    u = reference.policy_logits(case.adapter_logits.double(), case.base_logits.double(), case.coef)
    size = float(u.abs().max() + case.base_logits.double().abs().max() + 7)
    for x, y in zip(statistics, exact, strict=True):
        assert error(x, y).max() < 16 * FLOAT32_EPS * size


# --- day-one robustness (design §6) -----------------------------------------------------------


def hostile(case, where, stream="adapter_logits", value=-INF):
    logits = getattr(case, stream).clone()
    logits[where] = value
    return case._replace(**{stream: logits})


def check_infinite(result: Result, case) -> None:
    """Against the definition, infinities included. Finite numbers here are of size ~20.

    The gradient at an action that is −inf in either stream only has to be a number: the loss is
    infinite there, and whether its q still has a slope in a is nobody's question.
    """
    exact = definition(case)
    rows, column = torch.arange(len(case.actions)), case.actions.clamp_min(0)
    excluded = (case.adapter_logits + case.base_logits)[rows, column] == -INF
    assert not result.grad.isnan().any()
    for x in (result.grad, exact.grad):
        x[rows[excluded], column[excluded]] = 0
    for name, x, y in zip(Result._fields, result, exact, strict=True):
        assert (error(x, y) <= 64 * FLOAT32_EPS * 20).all(), name


@pytest.mark.parametrize("stream", ["adapter_logits", "base_logits"])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_minus_infinity_in_some_columns(backend, stream, name):
    """Half the vocabulary, then the first 96 columns (whole blocks and vectors of them)."""
    case = logits_case(rows=6, vocab=200, coef=COEFFICIENTS[name])
    for where in ((slice(None), slice(0, None, 2)), (slice(None), slice(0, 96))):
        case = hostile(case, where, stream)
        check_infinite(ours(case, backend), case)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_minus_infinity_at_the_action(backend, name):
    case = logits_case(rows=6, vocab=40, coef=COEFFICIENTS[name])
    rows = torch.tensor([0, 1, 3])
    for stream in ("adapter_logits", "base_logits"):
        check_infinite(
            ours(hostile(case, (rows, case.actions[rows]), stream), backend),
            hostile(case, (rows, case.actions[rows]), stream),
        )


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_rows_of_minus_infinity(backend, name):
    """V = −inf and a zero gradient in those rows; the other rows don't notice."""
    case = hostile(logits_case(rows=5, vocab=70, coef=COEFFICIENTS[name]), slice(1, 3))
    result = ours(case, backend)
    assert (result.value[1:3] == -INF).all() and torch.isfinite(result.value[3:]).all()
    assert torch.equal(result.grad[1:3], torch.zeros(2, 70))
    check_infinite(result, case)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_base_rows_of_minus_infinity(backend, name):
    case = logits_case(rows=5, vocab=70, coef=COEFFICIENTS[name])
    case = hostile(case, slice(1, 3), "base_logits")
    result = ours(case, backend)
    assert not any(x.isnan().any() for x in result)
    check_infinite(result, case)


def test_alpha_0_zero_with_infinite_base(backend):
    """α₀ = 0: the base has no say, and 0·inf may not make a NaN of it."""
    plain = logits_case(rows=5, vocab=70, coef=COEFFICIENTS["q_without_base"])
    case = hostile(plain, (slice(None), slice(10, 40)), "base_logits")
    case = hostile(case, 4, "base_logits")
    result, expected = ours(case, backend), ours(plain, backend)
    for name in ("q_action", "value", "grad"):
        assert same_bits([getattr(result, name)], [getattr(expected, name)]), name


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_statistics_with_disjoint_support(backend, name, side):
    """A column without probability adds 0; KL is +inf where the second argument does not cover."""
    case = logits_case(rows=4, vocab=40, coef=COEFFICIENTS[name], scale=1.0)
    case = hostile(case, (slice(None), slice(0, 20)), ("base_logits", "adapter_logits")[side > 0])
    case = hostile(case, 3)
    _, statistics = call(case, backend, return_statistics=True)
    exact = reference.soft_value(
        case.adapter_logits.double(), case.base_logits.double(), case.actions, case.coef
    ).statistics
    for x, y in zip(statistics, exact, strict=True):
        assert (error(x, y) < 1e-4).all()


def test_row_strides_and_columns_that_are_not_contiguous(backend):
    """Slices of a batch, every other row, a transposed tensor: same bits as their copies."""
    wide = torch.randn(4, 6, 130)
    views = [
        wide[:, :-1].flatten(0, 1), wide[:, 2], wide.flatten(0, 1)[::3],
        torch.randn(130, 6).t(), torch.randn(12, 260)[:, ::2], torch.randn(130).expand(5, 130),
    ]
    for view in views:
        case = logits_case(rows=len(view), vocab=130, coef=COEFFICIENTS["policy_dial"])
        for stream in ("adapter_logits", "base_logits"):
            strided = case._replace(**{stream: view})
            copied = case._replace(**{stream: view.clone(memory_format=torch.contiguous_format)})
            assert same_bits(ours(strided, backend), ours(copied, backend))


def test_padded_weights(backend):
    """The logits of a padded head, cut to the vocabulary: the tail is never counted."""
    case = logits_case(rows=5, vocab=101, dtype=torch.bfloat16)
    padded = torch.full((5, 128), 1e4, dtype=torch.bfloat16)
    padded[:, :101] = case.adapter_logits
    cut = case._replace(adapter_logits=padded[:, :101])
    assert same_bits(ours(cut, backend), ours(case, backend))


@pytest.mark.parametrize("used", ["q_action", "value", "both", "neither"])
def test_missing_upstream_gradients(backend, used):
    case = logits_case(rows=5, vocab=30)
    zero = torch.zeros(5)
    g = case.grad_q if used in ("q_action", "both") else zero
    v = case.grad_v if used in ("value", "both") else zero
    expected = definition(case._replace(grad_q=g, grad_v=v)).grad
    a = case.adapter_logits.requires_grad_()
    out = call(case, backend, a)
    loss = out.base_logprob.sum() * 0
    if used in ("q_action", "both"):
        loss = loss + (out.q_action * g).sum()
    if used in ("value", "both"):
        loss = loss + (out.value * v).sum()
    if used == "neither":
        assert not loss.requires_grad  # base_logprob and base_logsumexp carry no gradient
        return
    loss.backward()
    assert error(a.grad, expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["stride_0", "zero", "negative", "non_contiguous", "large"])
def test_upstream_gradients_of_every_kind(backend, kind):
    case = logits_case(rows=6, vocab=30)
    g, v = {
        "stride_0": (torch.ones(()).expand(6), torch.full((), 0.5).expand(6)),
        "zero": (torch.zeros(6), torch.zeros(6)),
        "negative": (-case.grad_q.abs(), -case.grad_v.abs()),
        "non_contiguous": (torch.randn(12)[::2], torch.randn(6, 3)[:, 1]),
        "large": (1e30 * case.grad_q, 1e30 * case.grad_v),
    }[kind]
    case = case._replace(grad_q=g, grad_v=v)
    result = ours(case, backend)
    check_logits(result, case)
    if kind == "zero":
        assert not result.grad.any()


def test_no_rows(backend):
    case = logits_case(rows=0, vocab=30)
    result = ours(case, backend)
    assert [tuple(x.shape) for x in result] == [(0,)] * 4 + [(0, 30)]
    _, statistics = call(case, backend, return_statistics=True)
    assert all(x.shape == (0,) for x in statistics)


def test_more_rows_than_a_grid_dimension(backend):
    """65,535 is the limit of a CUDA grid's second dimension."""
    case = logits_case(rows=65_537, vocab=3)
    check_logits(ours(case, backend), case)


def test_offsets_beyond_2_31_elements(backend):
    """Two rows 2³¹ + 8 elements apart. The memory between them is never touched."""
    stride = 2**31 + 8
    logits = torch.empty(stride + 64, dtype=torch.bfloat16).as_strided((2, 64), (stride, 1))
    case = logits_case(rows=2, vocab=64, dtype=torch.bfloat16)
    logits.copy_(case.adapter_logits)
    assert same_bits(
        call(case, backend, logits), call(case, backend)
    )
    far = logits.detach().requires_grad_()
    call(case, backend, far).value.sum().backward()
    near = case.adapter_logits.requires_grad_()
    call(case, backend, near).value.sum().backward()
    assert torch.equal(far.grad, near.grad)


def test_float16_does_not_overflow(backend):
    """u = (a + α₀·b)/α̃ reaches 10⁶ where float16 ends at 65,504."""
    coef = Coefficients(1.0, 0.1, 1.0, 0.0)
    case = logits_case(rows=5, vocab=50, dtype=torch.float16, coef=coef)
    case = case._replace(
        adapter_logits=(case.adapter_logits + 50_000), base_logits=(case.base_logits + 50_000)
    )
    result = ours(case, backend)
    assert all(torch.isfinite(x).all() for x in result)
    check_logits(result, case)


def test_last_column_as_action(backend):
    for vocab in (1, 16, 17, 128, 131):
        case = logits_case(rows=4, vocab=vocab)
        case = case._replace(actions=torch.full((4,), vocab - 1))
        check_logits(ours(case, backend), case)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_actions_of_any_integer_dtype(backend, dtype):
    case = logits_case(rows=4, vocab=100)
    case = case._replace(actions=torch.tensor([99, 0, 50, 3]))
    other = case._replace(actions=case.actions.to(dtype))
    assert same_bits(ours(other, backend), ours(case, backend))


def test_masked_rows_are_not_read(backend):
    """NaN in a masked row's logits, action and upstream gradient reaches nothing."""
    case = logits_case(rows=6, vocab=40)
    mask = torch.tensor([True, False, True, True, False, True])
    poisoned = hostile(hostile(case, ~mask, value=torch.nan), ~mask, "base_logits", torch.nan)
    poisoned.grad_q[~mask] = torch.nan
    poisoned.grad_v[~mask] = torch.nan
    result = ours(poisoned, backend, row_mask=mask)
    for x in result:
        assert not x[~mask].any()  # 0, and not NaN
    kept = case._replace(**{
        name: getattr(case, name)[mask]
        for name in ("adapter_logits", "base_logits", "actions", "grad_q", "grad_v")
    })
    assert same_bits([x[mask] for x in result], ours(kept, backend))


def test_cached_base_logsumexp(backend):
    """Given lse(b), the base is read at the action only where it has no weight in u."""
    case = logits_case(rows=5, vocab=60, coef=COEFFICIENTS["policy"])
    result = ours(case, backend)
    cached = ours(case, backend, base_logsumexp=result.base_logsumexp)
    for name in ("value", "base_logprob", "grad"):
        assert error(getattr(cached, name), getattr(result, name)).max() < 1e-5, name

    unread = torch.full_like(case.base_logits, torch.nan)
    column = case.actions.clamp_min(0)[:, None]
    unread.scatter_(1, column, case.base_logits.gather(1, column))
    poisoned = ours(
        case._replace(base_logits=unread), backend, base_logsumexp=result.base_logsumexp
    )
    assert same_bits(poisoned, cached)


def test_repeated_and_out_of_order_backward(backend):
    cases = [logits_case(rows=4, vocab=30, seed=seed) for seed in range(3)]
    leaves = [case.adapter_logits.clone().requires_grad_() for case in cases]
    losses = [
        (out.q_action * case.grad_q + out.value * case.grad_v).sum()
        for case, leaf in zip(cases, leaves, strict=True)
        for out in [call(case, backend, leaf)]
    ]
    expected = [ours(case, backend).grad for case in cases]
    for i in (2, 0, 1):
        losses[i].backward(retain_graph=True)
    losses[0].backward()
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, expected[i] * (2 if i == 0 else 1))


def test_in_place_backward_writes_over_the_logits(backend):
    case = logits_case(rows=5, vocab=77, dtype=torch.bfloat16)
    leaf = case.adapter_logits.clone().requires_grad_()
    logits = leaf * 1.0
    out = call(case, backend, logits, inplace_backward=True)
    loss = (out.q_action * case.grad_q + out.value * case.grad_v).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, ours(case, backend).grad)
    assert torch.equal(logits, leaf.grad)
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        loss.backward()


def test_in_place_backward_of_a_leaf_is_refused(backend):
    case = logits_case()
    with pytest.raises(ValueError, match="inplace_backward would overwrite a leaf"):
        call(case, backend, case.adapter_logits.requires_grad_(), inplace_backward=True)


def test_no_grad(backend):
    case = logits_case()
    expected = ours(case, backend)
    a = case.adapter_logits.requires_grad_()
    with torch.no_grad():
        out = call(case, backend, a)
    assert not any(x.requires_grad for x in out)
    assert same_bits(out, expected[:4])
    with torch.inference_mode():
        assert same_bits(call(case, backend), expected[:4])


def test_only_q_and_value_carry_gradients(backend):
    case = logits_case()
    out, statistics = call(
        case, backend, case.adapter_logits.requires_grad_(), return_statistics=True
    )
    assert out.q_action.requires_grad and out.value.requires_grad
    assert not out.base_logprob.requires_grad and not out.base_logsumexp.requires_grad
    assert not any(x.requires_grad for x in statistics)


def test_autocast_changes_nothing(backend):
    """The logits come as they are; under autocast they are still accumulated in float32."""
    case = logits_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ours(case, backend)
    assert same_bits(result, ours(case, backend))


def test_deterministic_to_the_bit(backend):
    case = logits_case(rows=37, vocab=1031, dtype=torch.bfloat16)
    first = ours(case, backend)
    assert all(same_bits(ours(case, backend), first) for _ in range(3))


def test_rows_do_not_depend_on_their_neighbours(backend):
    case = logits_case(rows=9, vocab=300, dtype=torch.bfloat16)
    whole = ours(case, backend)
    for i in range(9):
        row = case._replace(**{
            name: getattr(case, name)[i : i + 1]
            for name in ("adapter_logits", "base_logits", "actions", "grad_q", "grad_v")
        })
        assert same_bits(ours(row, backend), [x[i : i + 1] for x in whole])


@pytest.mark.parametrize("peak", [8.0, 16.0, 30.0])
def test_bfloat16_peaked_rows(backend, peak):
    """Where the policy is sure of its action, r = q − V cancels to a small number; in float32 what
    is left of it keeps float32's absolute error."""
    case = logits_case(rows=8, vocab=512, dtype=torch.bfloat16, scale=1.0,
                       coef=Coefficients(1.0, 1.0, 1.0, -1.0))
    actions = torch.randint(512, (8,))
    for stream in ("adapter_logits", "base_logits"):
        case = hostile(case, (torch.arange(8), actions), stream, peak)
    case = case._replace(actions=actions, grad_v=-case.grad_q)  # g + v = 0 at the action
    result, exact = ours(case, backend), definition(case)
    check_logits(result, case)
    reward = result.q_action - result.value
    assert error(reward, exact.q_action - exact.value).max() < 8 * FLOAT32_EPS * peak
    assert error(result.grad, exact.grad).max() <= (
        torch.finfo(torch.bfloat16).eps / 2 * exact.grad.abs().max() + 8 * FLOAT32_EPS * peak
    )


@pytest.mark.parametrize("offset", [1e3, 2.0**14])
def test_large_common_offsets(backend, offset):
    """log π and the gradient don't see an offset common to a row; lse(b) carries it."""
    case = logits_case(rows=5, vocab=200, coef=COEFFICIENTS["policy"])
    # Stored logits that the offset rounds: compare with float64 on what is stored.
    moved = case._replace(
        adapter_logits=case.adapter_logits + offset, base_logits=case.base_logits + offset
    )
    result, exact = ours(moved, backend), definition(moved)
    assert error(result.base_logprob, exact.base_logprob).max() < 64 * FLOAT32_EPS
    assert error(result.base_logsumexp, exact.base_logsumexp).max() <= FLOAT32_EPS * offset
    # p = exp(u − lse(u)) and lse(u) is stored in float32: half a unit in the last place of it.
    assert error(result.grad, exact.grad).max() < FLOAT32_EPS * offset * 4
