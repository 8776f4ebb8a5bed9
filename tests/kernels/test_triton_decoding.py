"""Combining two streams' logits, and sampling, in Triton.

The sampler is held against Hugging Face's own chain of filters, as sets of survivors (exact, but
for ties at top-p's threshold) and as frequencies.
"""

from __future__ import annotations

import math

import interpreter  # first: it decides how triton is imported
import pytest
import torch
import triton
import triton.language as tl
from cases import COEFFICIENTS, FLOAT32_EPS, error, logits_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, on_device

from qadapter_kernels import Coefficients, torch_backend
from qadapter_kernels import triton as backend_module
from qadapter_kernels.triton import launch, sampling

pytestmark = interpreter.quiet
INF = torch.inf


@pytest.fixture(autouse=True)
def _prepare(monkeypatch):
    interpreter.prepare(monkeypatch)


# --- combine_logits ----------------------------------------------------------------------------


def check_combined(case, strength, tolerance=64 * FLOAT32_EPS * 30):
    a, b, w = on_device(case.adapter_logits, case.base_logits, strength)
    out = backend_module.combine_logits(a, b, case.coef, w).cpu()
    exact = torch_backend.combine_logits(
        case.adapter_logits.double(), case.base_logits.double(), case.coef,
        None if strength is None else strength.double(),
    )
    dead = (exact == -INF).all(-1) | exact.isnan().all(-1)  # nothing left: −inf, and no NaN
    assert (out[dead] == -INF).all()
    assert out.dtype == torch.float32 and (error(out, exact)[~dead] <= tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_combine_equals_the_definition(name, dtype):
    for vocab in (1031, 1040):  # the second is aligned for 16-byte loads
        check_combined(logits_case(rows=2, vocab=vocab, dtype=dtype, coef=COEFFICIENTS[name]), None)


@pytest.mark.parametrize("name", ["policy", "policy_dial"])
def test_combine_with_a_strength_per_row(name):
    """w = 0 is the base, w = 1 the policy, beyond 1 exaggerates; −inf in either stream included."""
    case = logits_case(rows=5, vocab=700, scale=2.0, coef=COEFFICIENTS[name])
    case.adapter_logits[:, ::7], case.base_logits[:, 3::7] = -INF, -INF
    check_combined(case, torch.tensor([0.0, 1.0, 2.5, 0.3, -0.5]))


def test_combine_rows_without_support():
    case = logits_case(rows=3, vocab=600)
    case.adapter_logits[1] = -INF
    check_combined(case, None)


def test_combine_streams_of_no_weight():
    """Uniform over all columns, and over no padding."""
    case = logits_case(rows=2, vocab=601, coef=Coefficients(0.5, 0.8, 0.0, -0.5))
    out = backend_module.combine_logits(*on_device(*case[:2]), case.coef, None)
    assert error(out.cpu(), torch.full((2, 601), -math.log(601))).max() < 1e-6


def test_combine_large_common_offset():
    case = logits_case(rows=2, vocab=600, coef=COEFFICIENTS["policy"])
    moved = case._replace(adapter_logits=case.adapter_logits + 2.0**14)
    check_combined(moved, None, tolerance=16 * FLOAT32_EPS * 16)


def test_combine_strided_rows_and_no_rows():
    wide = torch.randn(3, 2, 901)[:, 1, 100:800]
    case = logits_case(rows=3, vocab=700, coef=COEFFICIENTS["policy_dial"])
    check_combined(case._replace(adapter_logits=wide), None)
    empty = torch.empty(0, 700, device=DEVICE)
    assert backend_module.combine_logits(empty, empty, case.coef, None).shape == (0, 700)


# --- sample ------------------------------------------------------------------------------------


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, offset=0):
    (logits,) = on_device(logits)
    return backend_module.sample(logits, temperature, top_k, top_p, min_p, seed, offset).cpu()


def survivors(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Hugging Face's warpers, in the order ``generate`` applies them, in float64."""
    from transformers.generation import logits_process as hf

    scores = logits.double() / temperature
    if top_k:
        scores = hf.TopKLogitsWarper(min(top_k, scores.shape[1]))(None, scores)
    if top_p < 1:
        scores = hf.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = hf.MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.4}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_softmax(filters):
    """Frequencies of equal rows: Pearson's χ² stays under its 99.99% quantile."""
    from scipy.stats import chi2

    logits = torch.tensor([1.3, -0.4, 2.2, 0.1, 1.9, -1.5, 0.9, -INF])
    rows = 120 if interpreter.INTERPRETED else 20_000
    counts = torch.bincount(draw(logits.expand(rows, 8), **filters, seed=11), minlength=8).double()
    expected = rows * survivors(logits[None], **filters)[0]
    assert not counts[expected == 0].any()
    likely = expected > 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < chi2.ppf(0.9999, max(int(likely.sum()) - 1, 1))


@triton.jit
def _threshold_kernel(
    row_ptr, key_ptr, threshold_ptr, num_columns, low, high, limit, peak, per_temperature,
    BY_MASS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):
    for column in range(num_columns):
        tl.store(key_ptr + column, sampling._ordered(tl.load(row_ptr + column)))
    threshold = sampling._threshold(
        row_ptr, num_columns, tl.cast(low, tl.int64), tl.cast(high, tl.int64), limit, peak,
        per_temperature, BY_MASS, LANES, VEC, ALIGNED,
    )
    tl.store(threshold_ptr, threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_mass", [False, True])
def test_thresholds_are_exact(dtype, by_mass):
    """Neither a column too many nor one too few, with ties (16-bit logits are full of them),
    infinities and both zeros."""
    logits = (3 * torch.randn(90)).to(dtype)
    logits[3], logits[5], logits[6] = -INF, 0.0, -0.0
    weights = logits.double().exp() if by_mass else torch.ones(90).double()
    above = (weights * (logits[None] > logits[:, None])).sum(-1)
    for share in (0.02, 0.31, 0.5, 0.9, 0.999):
        limit = float(share * weights.sum()) if by_mass else round(90 * share)
        row, keys = on_device(logits, torch.empty(90, dtype=torch.int32))
        threshold = torch.empty(1, dtype=torch.int64, device=DEVICE)
        bound = 2**31 - 1 if dtype == torch.float32 else 2**15 - 1
        _threshold_kernel[(1,)](
            row, keys, threshold, 90, -bound - 1, bound, float(limit), 0.0, 1.0,
            by_mass, LANES=16, VEC=4, ALIGNED=dtype == torch.float32, num_warps=1,
        )
        assert torch.equal((keys >= threshold).cpu(), above < limit)
        order = keys.cpu().long()
        assert torch.equal(order[:, None] > order, logits[:, None] > logits)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_draws_survive_hugging_faces_filters(data):
    """Over shapes, dtypes, scales and filters: what is drawn is a survivor."""
    vocab = data.draw(st.integers(1, 700))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scale = data.draw(st.sampled_from([0.1, 2.0, 20.0]))
    logits = (scale * torch.randn(1, vocab, generator=generator)
              + data.draw(st.sampled_from([0.0, -50.0, 300.0]))).to(dtype)
    filters = dict(
        temperature=data.draw(st.sampled_from([0.3, 1.0, 2.0])),
        top_k=data.draw(st.sampled_from([0, 1, 5, 50, 600])),
        top_p=data.draw(st.sampled_from([1.0, 0.99, 0.6, 0.1])),
        min_p=data.draw(st.sampled_from([0.0, 0.05, 0.5])),
    )
    weakest = logits[0][survivors(logits, **filters)[0] > 0].min()
    token = int(draw(logits, **filters, seed=3, offset=vocab)[0])
    assert logits[0, token] >= weakest  # ties at top-p's threshold are all kept


@pytest.mark.slow
def test_ties_at_the_threshold_are_all_kept():
    """top-k as Hugging Face; top-p keeps a whole group of equal logits or none of it."""
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, -0.0], dtype=torch.bfloat16).expand(24, 6)
    assert set(draw(logits, top_k=2).tolist()) == {0, 1, 2, 3}
    assert set(draw(logits, top_p=0.6).tolist()) == {0, 1, 2, 3}


@pytest.mark.slow
def test_draws_are_named_by_seed_offset_row_and_column(monkeypatch):
    """The same in any launch geometry and batch; another seed, offset or row draws anew."""
    logits = torch.randn(1, 600).expand(8, 600)
    first = draw(logits, seed=5, offset=2**40 + 7)
    assert torch.equal(draw(logits, seed=5, offset=2**40 + 7), first)
    assert torch.equal(draw(logits[:4], seed=5, offset=2**40 + 7), first[:4])
    monkeypatch.setitem(launch.TILES, "sample", launch.Tile(128, 4))
    assert torch.equal(draw(logits, seed=5, offset=2**40 + 7), first)
    assert len(set(first.tolist())) > 3
    for other in ({"seed": 6, "offset": 2**40 + 7}, {"seed": 5, "offset": 7},
                  {"seed": 5 + 2**32, "offset": 2**40 + 7}, {"seed": -5, "offset": 2**40 + 7}):
        assert not torch.equal(draw(logits, **other), first)


def test_rows_in_which_nothing_can_be_drawn():
    logits = torch.randn(5, 50)
    logits[1], logits[2] = -INF, torch.nan
    logits[3, 7], logits[4, 7] = INF, torch.nan
    for filters in ({}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}):
        drawn = draw(logits, **filters)
        assert drawn[[1, 2, 4]].tolist() == [-1] * 3 and drawn[3] == 7 and 0 <= drawn[0] < 50


def test_the_only_survivor_is_always_drawn():
    """Even by a column far below the others' scale, in the last place of the row."""
    logits = torch.full((3, 700), -INF)
    logits[:, -1] = -1e30
    assert draw(logits, top_p=0.5).tolist() == [699] * 3


def test_strided_rows_and_no_rows():
    """The copy is aligned for 16-byte loads and the slice is not: other lanes, the same draws."""
    logits = torch.randn(4, 3, 620)[:, 1, 5:613]
    (sliced,) = on_device(logits)
    drawn = backend_module.sample(sliced, 1.0, 5, 1.0, 0.0, 0, 0).cpu()
    assert torch.equal(drawn, draw(logits.contiguous(), top_k=5))
    assert draw(logits[:0]).shape == (0,)


@pytest.mark.parametrize("wrong", [
    {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": -0.1},
], ids=str)
def test_filters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"want top_k|temperature must"):
        draw(torch.zeros(1, 4), **wrong)
