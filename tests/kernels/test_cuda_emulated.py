"""The CUDA kernels, run thread by thread on a CPU (kernels/csrc/cuda/emulator.hpp), against the
float64 definition: index arithmetic, tails, merging, in-place order, clusters, the Python side."""

from __future__ import annotations

import pytest
import torch
from cases import (
    COEFFICIENTS,
    DTYPES,
    assert_close_as_eager,
    bits,
    check_linear,
    check_logits,
    definition,
    linear_case,
    linear_ours,
    logits_case,
    ours,
    same_bits,
)
from cuda_emulator import cluster_launches, emulated
from hypothesis import given
from hypothesis import strategies as st
from rows import RowCase, check, guarded, guards_hold, row_case, run
from rows import definition as rows_definition

from qadapter_kernels import Coefficients, cuda_backend, reference, soft_value, torch_backend

INF = torch.inf
HALVES = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
RESIDUALS = [*((dtype, dtype) for dtype in DTYPES), *HALVES]
# 64 threads of 8 16-bit elements: 1037 is more than a round of a block and ends in a tail.
VOCABULARIES = [1, 7, 130, 1037]


# --- logits level -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_logits(name, vocab, dtype):
    case = logits_case(vocab=vocab, dtype=dtype, coef=COEFFICIENTS[name])
    with emulated():
        check_logits(ours(case, "cuda"), case)
        lse = definition(case).base_logsumexp.float()
        check_logits(ours(case, "cuda", base_logsumexp=lse), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab, splits", [(1, 13_001, 3), (3, 9_007, 2), (8, 9_007, 1)])
def test_few_rows_are_split_over_blocks(rows, vocab, splits, dtype):
    """Odd strides and a last block that is shorter; a masked row, a row whose support is in one
    block alone, an action in the last column; with and without statistics and a given lse(b)."""
    coef = COEFFICIENTS["policy_dial"]
    case = logits_case(rows=rows, vocab=vocab, dtype=dtype, coef=coef)
    a, b, actions = case.adapter_logits.clone(), case.base_logits.clone(), case.actions.clone()
    a[0, 3000:], actions[0] = -INF, 2999
    actions[-1] = vocab - 1
    if rows > 2:
        a[1], actions[1] = torch.nan, reference.MASKED_ROW
    masked = actions == reference.MASKED_ROW
    eager = reference.soft_value(a, b, actions.clamp_min(-1), coef)[:5]
    exact = reference.soft_value(a.double(), b.double(), actions.clamp_min(-1), coef)
    lse = exact[3].float()
    for order, given_lse, statistics in ((0, None, False), (1, None, True), (2, lse, False)):
        with emulated(order=order):
            assert cuda_backend._splits(a) == splits
            *out, stats = cuda_backend.logits_forward(a, b, actions, coef, given_lse, statistics)
        for ours_N, eager_N, exact_N in zip(out, eager, exact[:5], strict=True):
            assert not ours_N[..., masked].any()
            assert_close_as_eager(
                ours_N[..., ~masked], exact_N[..., ~masked], eager_N[..., ~masked], 32.0
            )
        if statistics:
            assert not stats[:, masked].any()
            for ours_N, exact_N in zip(stats, exact.statistics, strict=True):
                torch.testing.assert_close(
                    ours_N[~masked].double(), exact_N[~masked], rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [(0, 0), (3, 3), (1, 2)], ids=str)
def test_logits_of_any_alignment(dtype, offsets):
    """Odd strides; both streams off the 16-byte boundary alike (head, vectors, tail) or not."""
    case = logits_case(vocab=533, dtype=dtype)
    a, b = (
        guarded(x, stride=541, offset=offset)
        for x, offset in zip((case.adapter_logits, case.base_logits), offsets, strict=True)
    )
    case = case._replace(adapter_logits=a, base_logits=b)
    with emulated():
        result = ours(case, "cuda")
        check_logits(result, case)
        normalizer = reference.soft_value(a.float(), b, case.actions, case.coef).policy_normalizer
        cuda_backend.logits_backward(
            a, b, case.actions, normalizer, case.grad_q, case.grad_v, case.coef, a
        )
    assert guards_hold(a) and guards_hold(b)
    assert_close_as_eager(a, result.grad, result.grad.float(), 8.0)  # in place


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("threads", [32, 96])
def test_logits_at_the_edge_of_support(name, threads):
    """-inf columns, in either stream, at the action too; whole rows of -inf; masked rows of NaN."""
    coef = COEFFICIENTS[name]
    case = logits_case(rows=8, vocab=77, coef=coef)
    a, b = case.adapter_logits.clone(), case.base_logits.clone()
    actions = case.actions.clone()
    a[0, 3:40] = -INF
    b[1, 30:70] = -INF
    a[3, actions[3]] = -INF
    b[4, actions[4]] = -INF
    a[5], b[6] = -INF, -INF
    a[7], b[7], actions[7] = torch.nan, torch.nan, reference.MASKED_ROW
    exact = reference.soft_value(a.double(), b.double(), actions.clamp_min(-1), coef)
    exact = [x * (actions != -2) for x in exact[:5]]
    with emulated(threads):
        out = cuda_backend.logits_forward(a, b, actions, coef, None, False)
        grad = torch.full_like(a, torch.nan)
        cuda_backend.logits_backward(
            a, b, actions, out[4], case.grad_q, case.grad_v, coef, grad
        )
    for x, y in zip(out, exact, strict=False):
        torch.testing.assert_close(
            x[..., :7].double(), y[..., :7], rtol=1e-5, atol=1e-5, equal_nan=True
        )
        assert (x[..., 7] == 0).all()
    plain = torch.empty_like(a)
    torch_backend.logits_backward(
        a[:7], b[:7], actions[:7], out[4][:, :7], case.grad_q[:7], case.grad_v[:7], coef, plain[:7]
    )
    torch.testing.assert_close(grad[:7], plain[:7], rtol=1e-5, atol=1e-6)
    assert (grad[7] == 0).all() and (grad[out[4][1] == 0] == 0).all()


def test_a_base_without_weight_is_read_at_the_action_only():
    coef = COEFFICIENTS["policy"]._replace(alpha_0=0.0, base_coef=0.0)
    case = logits_case(vocab=50, coef=coef)
    b = torch.full_like(case.base_logits, torch.nan)
    columns = case.actions.clamp_min(0)[:, None]
    b.scatter_(1, columns, case.base_logits.gather(1, columns))
    lse = case.base_logits.logsumexp(-1)
    with emulated():
        with_holes = ours(case._replace(base_logits=b), "cuda", base_logsumexp=lse)
        assert same_bits(with_holes, ours(case, "cuda", base_logsumexp=lse))


def test_an_action_outside_the_vocabulary_is_loud_and_reads_nothing():
    case = logits_case(rows=2, vocab=16)
    a, b = guarded(case.adapter_logits), guarded(case.base_logits)
    actions = torch.tensor([16, 1 << 40])
    with emulated():
        q, value, logprob, *_ = cuda_backend.logits_forward(a, b, actions, case.coef, None, False)
    assert q.isnan().all() and logprob.isnan().all() and value.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype):
    """A large common offset and one between the streams cost no digits; what is not covered is
    infinitely far."""
    case = logits_case(rows=6, vocab=200, dtype=torch.float32)
    a, b = case.adapter_logits.clone(), case.base_logits.clone()
    a[3], b[3] = a[3] + 8192, b[3] - 4096
    a[4, 5], b[5, 6] = -INF, -INF
    a, b, coef = a.to(dtype), b.to(dtype), COEFFICIENTS["policy"]
    exact = reference.soft_value(a.double(), b.double(), case.actions, coef).statistics
    with emulated(order=5):
        *_, stats = cuda_backend.logits_forward(a, b, case.actions, coef, None, True)
    torch.testing.assert_close(stats.double(), torch.stack(exact), rtol=2e-6, atol=2e-5)
    assert stats[2, 4] == INF and stats[1, 5] == INF


@given(
    vocab=st.integers(1, 300), stride=st.integers(0, 9),
    offsets=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dtype=st.sampled_from(DTYPES), name=st.sampled_from(sorted(COEFFICIENTS)),
    shift=st.sampled_from([0.0, 1000.0, -3000.0]), order=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_logits_of_any_shape(vocab, stride, offsets, dtype, name, shift, order, seed):
    case = logits_case(3, vocab, dtype, coef=COEFFICIENTS[name], seed=seed)
    a, b = (
        guarded((x.float() + shift).to(dtype), vocab + stride, offset)
        for x, offset in zip((case.adapter_logits, case.base_logits), offsets, strict=True)
    )
    case = case._replace(adapter_logits=a, base_logits=b)
    with emulated(32, order):
        check_logits(ours(case, "cuda"), case)
    assert guards_hold(a) and guards_hold(b)


def test_rows_beyond_two_to_the_31_elements():
    """Row 1 starts 2³¹ + 8 elements after row 0; the pages between are never touched."""
    stride = (1 << 31) + 8
    case = logits_case(rows=2, vocab=40, dtype=torch.bfloat16)
    far = torch.empty(stride + 40, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    far.copy_(case.adapter_logits)
    with emulated():
        near = cuda_backend.logits_forward(*case[:3], case.coef, None, False)
        out = cuda_backend.logits_forward(far, *case[1:3], case.coef, None, False)
        assert same_bits(out, near)
        result = cuda_backend.rows_forward(
            far, None, case.actions, 1.0, None, 1.0, None, True, torch.bfloat16, False
        )
    torch.testing.assert_close(result[0], case.adapter_logits.float().logsumexp(-1))
    assert (far.float().sum(-1).abs() < 0.05).all()  # P′ of a row with an action sums to 0


# --- the row kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("dtypes", RESIDUALS, ids=lambda x: f"{x[0]}-{x[1]}".replace("torch.", ""))
@pytest.mark.parametrize("vocab", [*VOCABULARIES, 8192])
@pytest.mark.parametrize("options", ["plain", "base", "bias", "exact", "statistics"])
def test_rows(options, vocab, dtypes, clusters):
    """Both versions over the same cases; odd rows fall back to the general one."""
    dtype, residual_dtype = dtypes
    case = row_case(
        vocab=vocab, dtype=dtype, base=options != "plain", bias=options == "bias",
        exact=options in ("exact", "statistics"),
    )
    exact, eager = rows_definition(case), rows_definition(case, torch.float32)
    before = cluster_launches_in(clusters)
    with emulated(clusters=clusters):
        result = run(cuda_backend, case, residual_dtype, options == "statistics")
    check(result, exact, eager)
    served = cluster_launches() - before
    assert served == (clusters and vocab * dtype.itemsize % 16 == 0)
    if dtype == residual_dtype:
        assert guards_hold(case.z)


def cluster_launches_in(clusters: bool) -> int:
    with emulated(clusters=clusters):
        return cluster_launches()


@pytest.mark.parametrize(
    "vocab, dtype",
    [(128_256, torch.bfloat16), (128_256, torch.float32), (50_264, torch.float16),
     (128_300, torch.float32), (300_000, torch.float32)],
)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_rows_of_a_large_vocabulary_over_a_cluster(vocab, dtype, order):
    """257 KB over four blocks, 513 KB over eight, slices of unequal length, 1.2 MB over eight with
    one block a multiprocessor; whatever order their threads run in."""
    case = row_case(rows=4, vocab=vocab, dtype=dtype, base=order == 1, exact=True)
    exact, eager = rows_definition(case), rows_definition(case, torch.float32)
    before = cluster_launches_in(True)
    residual_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    with emulated(128, order, clusters=True):
        check(run(cuda_backend, case, residual_dtype, order == 1), exact, eager)
    assert cluster_launches() == before + 1
    assert dtype == torch.float32 or guards_hold(case.z)


def test_rows_too_long_for_a_cluster():
    case = row_case(rows=1, vocab=600_000, base=False)
    exact, eager = rows_definition(case), rows_definition(case, torch.float32)
    before = cluster_launches_in(True)
    with emulated(128, clusters=True):
        check(run(cuda_backend, case, torch.float32, False), exact, eager)
    assert cluster_launches() == before


@pytest.mark.parametrize("dtypes", [*HALVES, (torch.bfloat16, torch.bfloat16)],
                         ids=lambda x: f"{x[0]}-{x[1]}".replace("torch.", ""))
@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_in_place_in_any_order(dtypes, clusters, offset):
    """P′ never lands on logits that another thread has still to read: the threads' order changes
    no bit. 2,000 columns take several rounds of a block."""
    results = []
    for order in (0, 1, 2, 3):
        case = row_case(vocab=2000, dtype=dtypes[0], base=False, offset=offset)
        exact, eager = rows_definition(case), rows_definition(case, torch.float32)
        with emulated(32, order, clusters):
            results.append(run(cuda_backend, case, dtypes[1], False))
        check(results[-1], exact, eager)
    assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("vocab, stride, offsets", [(301, 303, (1, 4)), (301, 304, (0, 0)),
                                                    (304, 304, (0, 4)), (304, 306, (0, 0))])
def test_rows_that_line_up_differently(vocab, stride, offsets, statistics):
    """z and its base off the boundary by different amounts, joined by the statistics; rows that
    end off a boundary; strides that move it from row to row."""
    case = row_case(
        vocab=vocab, dtype=torch.bfloat16, stride=stride, offset=offsets[0],
        base_offset=offsets[1], exact=True,
    )
    exact, eager = rows_definition(case), rows_definition(case, torch.float32)
    with emulated(clusters=True):
        check(run(cuda_backend, case, torch.bfloat16, statistics), exact, eager)
    assert guards_hold(case.z) and guards_hold(case.zb)


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("dtypes", RESIDUALS, ids=lambda x: f"{x[0]}-{x[1]}".replace("torch.", ""))
def test_rows_without_support(dtypes, clusters):
    z = torch.full((2, 64), -INF, dtype=dtypes[0])
    z[1, 5:] = 1.0
    case = RowCase(z, z.clone(), torch.tensor([3, 7]), 1.0, None, 1.0, None, None)
    with emulated(clusters=clusters):
        result = run(cuda_backend, case, dtypes[1], True)
    assert result.policy_lse[0] == -INF and result.base_lse[0] == -INF
    assert (result.residual[0] == 0).all() and (result.statistics[:, 0] == 0).all()
    expected = torch.full((64,), 1 / 59).index_fill_(0, torch.arange(5), 0.0)
    expected[7] -= 1
    torch.testing.assert_close(result.residual[1].float(), expected, rtol=4e-3, atol=0)
    torch.testing.assert_close(result.statistics[:, 1], torch.tensor([59.0, 1, 1]).log())


def test_rows_without_a_residual_leave_z_alone():
    case = row_case(vocab=512, dtype=torch.bfloat16)
    before, exact = bits(case.z), rows_definition(case)
    eager = rows_definition(case, torch.float32)
    with emulated(clusters=True):
        result = run(cuda_backend, case, None, True)
    check(result, exact, eager)
    assert torch.equal(bits(case.z), before)


def test_both_versions_give_the_same_losses():
    general, cluster = (row_case(vocab=4096, dtype=torch.float32) for _ in range(2))
    with emulated():
        expected = run(cuda_backend, general, torch.bfloat16, False)
    with emulated(clusters=True):
        result = run(cuda_backend, cluster, torch.bfloat16, False)
    torch.testing.assert_close(result.policy_lse, expected.policy_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["policy", "policy_dial", "q"])
def test_hidden_level(name, dtype, clusters):
    case = linear_case(vocab=136, dtype=dtype, coef=COEFFICIENTS[name], bias=name == "q")
    with emulated(clusters=clusters):
        check_linear(linear_ours(case, "cuda"), case)


def test_row_kernel_says_what_it_cannot_do():
    case = row_case(rows=2, dtype=torch.bfloat16)
    with emulated():
        with pytest.raises(TypeError, match=r"residual of torch\.float16"):
            run(cuda_backend, case, torch.float16, False)
        with pytest.raises(ValueError, match="zb_RV is needed"):
            run(cuda_backend, case._replace(zb=None), torch.bfloat16, True)


# --- sequence loss, decoding ------------------------------------------------------------------


@pytest.mark.parametrize("bootstrap", ["next", "current"])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lengths", [[3, 1, 0, 4, 100, 70], [1, 1], [0, 0], [400, 300]], ids=str)
def test_bradley_terry(bootstrap, gamma, lengths):
    lengths_S = torch.tensor(lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_S.cumsum(0)])
    n, sequences = int(offsets[-1]), len(lengths)
    q, v = torch.randn(n), torch.randn(n)
    divisors = lengths_S.clamp_min(1).float()
    grads = (torch.randn(3), torch.randn(sequences), torch.randn(n))
    numbers = (gamma, 0.3, bootstrap == "next", 2 / sequences, 1 / max(n, 1))

    q64, v64 = q.double().requires_grad_(), v.double().requires_grad_()
    loss, preference, chi2, rewards, tokens = reference.bradley_terry(
        q64, v64, offsets, gamma=gamma, chi2_coef=0.3, bootstrap=bootstrap,
        divisors=divisors.double(), num_pairs=sequences / 2, num_actions=max(n, 1),
    )
    losses = torch.stack([loss, preference, chi2])
    total = sum((x * g).sum() for x, g in zip((losses, rewards, tokens), grads, strict=True))
    exact_grads = torch.autograd.grad(total, (q64, v64), materialize_grads=True)

    if gamma == 0:
        v.fill_(INF)  # not read
    with emulated():
        result = cuda_backend.bradley_terry_forward(q, v, offsets, divisors, *numbers)
        result_grads = cuda_backend.bradley_terry_backward(
            result[2], result[1], offsets, divisors, *numbers, *grads
        )
    for x, y in zip((*result, *result_grads), (losses, rewards, tokens, *exact_grads), strict=True):
        torch.testing.assert_close(x.double(), y.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_combine_logits(name, vocab, dtype):
    case = logits_case(rows=5, vocab=vocab, dtype=dtype, coef=COEFFICIENTS[name])
    a, b = case.adapter_logits.clone(), case.base_logits.clone()
    if vocab > 20:
        a[1, 4:9], b[2, 7:20] = -INF, -INF
    for strength in (None, torch.tensor([0.0, 1.0, 0.4, 1.7, -0.5])):
        double = None if strength is None else strength.double()
        exact = torch_backend.combine_logits(a.double(), b.double(), case.coef, double)
        with emulated():
            logp = cuda_backend.combine_logits(a, b, case.coef, strength)
        torch.testing.assert_close(logp.double(), exact, rtol=3e-6, atol=2e-5)


# --- all of it --------------------------------------------------------------------------------


def test_no_rows():
    case = logits_case(rows=0)
    with emulated():
        assert all(x.numel() == 0 for x in ours(case, "cuda"))
        assert cuda_backend.combine_logits(*case[:2], case.coef, None).shape == (0, 130)
        rows = row_case(rows=0)
        assert run(cuda_backend, rows, torch.float32, True).statistics.shape == (3, 0)


@pytest.mark.parametrize("clusters", [False, True])
def test_every_order_of_threads_gives_the_same_bits(clusters):
    """No thread relies on another's progress but through a barrier."""
    results = []
    for order in (0, 1, 11, 12):
        case, rows = logits_case(vocab=700), row_case(vocab=704)
        with emulated(96, order, clusters):
            stats = soft_value(
                *case[:3], **case.coef._asdict(), backend="cuda", return_statistics=True
            )[1]
            row_results = run(cuda_backend, rows, torch.float32, True)
            results.append([*ours(case, "cuda"), *stats, *row_results])
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_coefficients_reach_the_kernels_in_full():
    """c_b + α₀ is 0 in double precision or it is not: rounding each to float32 first would leave a
    trace of the base (or lose one)."""
    case = logits_case(vocab=64, coef=Coefficients(0.1, 1.0, 1.0, -0.1))
    b = torch.full_like(case.base_logits, INF)
    with emulated():
        _, value, _, _, (peak, total), _ = cuda_backend.logits_forward(
            case.adapter_logits, b, torch.full((5,), -1), case.coef, torch.zeros(5), False
        )
    lse = case.adapter_logits.logsumexp(-1)
    torch.testing.assert_close(peak + total.log(), lse)
    torch.testing.assert_close(value, lse)
