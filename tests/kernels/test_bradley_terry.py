"""The sequence loss: every CPU backend against a loop in plain Python and against autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CPU_BACKENDS, FLOAT32_EPS, error, same_bits
from hypothesis import given
from hypothesis import strategies as st

from qadapter_kernels import bradley_terry

BOOTSTRAPS = ("next", "current")
NORMALIZATIONS = ("none", "completion", "padded")


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


def batch(lengths, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    q, v = (scale * torch.randn(int(offsets[-1]), generator=generator) for _ in range(2))
    return q.to(dtype), v.to(dtype), offsets


def by_hand(q, v, offsets, gamma, chi2_coef, bootstrap, normalization="none", padded_length=None,
            num_pairs=None, num_actions=None):
    """The definition, one action after the other, in Python's floats."""
    q, v, offsets = q.double().tolist(), v.double().tolist(), offsets.tolist()
    rewards, returns = [], []
    for start, end in itertools.pairwise(offsets):
        total = 0.0
        for k in range(start, end):
            following = v[k] if bootstrap == "current" else (v[k + 1] if k + 1 < end else 0.0)
            rewards.append(q[k] - gamma * following)
            total += rewards[-1]
        divisor = {"none": 1, "completion": max(end - start, 1)}.get(normalization)
        returns.append(total / (padded_length - 1 if divisor is None else divisor))
    pairs = len(returns) // 2
    margins = [returns[i] - returns[pairs + i] for i in range(pairs)]
    preference = sum(max(-m, 0.0) + math.log1p(math.exp(-abs(m))) for m in margins)
    preference /= pairs if num_pairs is None else num_pairs
    chi2 = sum(r * r for r in rewards)
    chi2 /= max(len(rewards), 1) if num_actions is None else num_actions
    return preference + chi2_coef * chi2, preference, chi2, returns, rewards


def compare(out, expected, tolerance):
    for x, y in zip(out, expected, strict=True):
        y = torch.tensor(y, dtype=torch.float64).reshape(x.shape)
        assert (error(x, y) <= tolerance * (1 + y.abs())).all(), (x, y)


LENGTHS = [3, 1, 0, 4, 2, 0, 5, 1]
"""One-action sequences and empty ones, chosen and rejected."""


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_equals_the_definition(backend, gamma, bootstrap, normalization):
    q, v, offsets = batch(LENGTHS)
    options = dict(gamma=gamma, chi2_coef=0.3, bootstrap=bootstrap)
    out = bradley_terry(
        q, v, offsets, **options, length_normalization=normalization, padded_length=7,
        backend=backend,
    )
    compare(out, by_hand(q, v, offsets, *options.values(), normalization, 7), 8 * FLOAT32_EPS)


@given(data=st.data())
def test_any_lengths_and_values(data):
    pairs = data.draw(st.integers(0, 5))
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=2 * pairs, max_size=2 * pairs))
    q, v, offsets = batch(
        lengths, data.draw(st.integers(0, 99)), scale=data.draw(st.sampled_from([0.1, 1.0, 100.0]))
    )
    gamma, chi2_coef = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 2))
    bootstrap = data.draw(st.sampled_from(BOOTSTRAPS))
    num_pairs, num_actions = data.draw(st.floats(0.25, 64)), data.draw(st.floats(0.25, 500))
    expected = by_hand(
        q, v, offsets, gamma, chi2_coef, bootstrap, num_pairs=num_pairs, num_actions=num_actions
    )
    size = 1 + sum(abs(r) for r in expected[4])
    for name in CPU_BACKENDS:
        out = bradley_terry(
            q, v, offsets, gamma=gamma, chi2_coef=chi2_coef, bootstrap=bootstrap,
            num_pairs=num_pairs, num_actions=num_actions, backend=name,
        )
        # Sums of up to 40 rewards: their roundings, through a slope of at most 1/num_pairs.
        compare(out, expected, 8 * FLOAT32_EPS * size / min(num_pairs, 1))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_float64_gradcheck_through_every_output(bootstrap, normalization):
    q, v, offsets = batch(LENGTHS, dtype=torch.float64)

    def outputs(q, v):
        return bradley_terry(
            q, v, offsets, gamma=0.9, chi2_coef=0.3, bootstrap=bootstrap,
            length_normalization=normalization, padded_length=7, num_pairs=6, num_actions=20,
        )

    assert torch.autograd.gradcheck(outputs, (q.requires_grad_(), v.requires_grad_()))


@pytest.mark.parametrize("output", ["loss", "preference_loss", "chi2_loss", "sequence_rewards",
                                    "token_rewards", "all"])
@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_gradients_equal_float64(backend, bootstrap, output):
    """Each output alone (the others' upstream gradients are missing), and all of them."""
    grads = []
    for dtype, name in ((torch.float64, "torch"), (torch.float32, backend)):
        q, v, offsets = batch(LENGTHS, dtype=dtype)
        out = bradley_terry(
            q.requires_grad_(), v.requires_grad_(), offsets, gamma=0.9, chi2_coef=0.3,
            bootstrap=bootstrap, length_normalization="completion", backend=name,
        )
        chosen = out if output == "all" else [getattr(out, output)]
        weights = torch.linspace(-1, 1, 40, dtype=dtype)
        sum((x * weights[: x.numel()].reshape(x.shape)).sum() for x in chosen).backward()
        grads.append((q.grad, v.grad))
    for x, y in zip(*grads, strict=True):
        assert error(y, x).max() < 16 * FLOAT32_EPS


def test_no_actions(backend):
    """Nothing masked in: the loss of zero rewards, and gradients of the right shape."""
    q, v = (torch.zeros(0, requires_grad=True) for _ in range(2))
    out = bradley_terry(q, v, torch.zeros(5, dtype=torch.int64), backend=backend)
    assert out.loss.item() == pytest.approx(math.log(2)) and out.chi2_loss.item() == 0
    assert out.sequence_rewards.tolist() == [0.0] * 4
    out.loss.backward()
    assert q.grad.shape == v.grad.shape == (0,)


def test_no_pairs(backend):
    q = torch.zeros(0, requires_grad=True)
    out = bradley_terry(q, q, torch.zeros(1, dtype=torch.int64), backend=backend)
    assert out.loss.item() == 0
    out.loss.backward()


def test_value_is_not_read_without_discount(backend):
    """γ = 0: 0·inf would be NaN."""
    q, v, offsets = batch([2, 2])
    v = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], requires_grad=True)
    for bootstrap in BOOTSTRAPS:
        out = bradley_terry(q, v, offsets, gamma=0.0, bootstrap=bootstrap, backend=backend)
        assert torch.equal(out.token_rewards, q)
        (grad,) = torch.autograd.grad(out.loss + 0 * v[3], v)
        assert not grad.any()


@pytest.mark.parametrize("margin", [-1e4, -100.0, 100.0, 1e4])
def test_large_margins_neither_overflow_nor_vanish(backend, margin):
    q = torch.tensor([margin, 0.0], requires_grad=True)
    out = bradley_terry(q, torch.zeros(2), torch.tensor([0, 1, 2]), backend=backend)
    assert out.loss.item() == pytest.approx(max(-margin, 0.0), abs=1e-30)
    out.loss.backward()
    slope = -1.0 if margin < 0 else 0.0
    assert q.grad.tolist() == pytest.approx([slope, -slope], abs=1e-30)


def test_parts_of_a_batch_add_up(backend):
    """num_pairs and num_actions of the whole: parts sum to its loss and gradient. Where gradients
    are averaged over processes, each divides by its share, which may be less than 1."""
    lengths = [3, 1, 4, 2, 2, 5, 1, 3]
    q, v, offsets = batch(lengths)
    options = dict(gamma=0.9, chi2_coef=0.3, backend=backend)

    def run(pairs, **denominators):
        sequences = [*pairs, *(4 + i for i in pairs)]
        rows = torch.cat([torch.arange(*offsets[i : i + 2].tolist()) for i in sequences])
        parts_q, parts_v = q[rows].requires_grad_(), v[rows].requires_grad_()
        out = bradley_terry(
            parts_q, parts_v,
            torch.tensor([0, *itertools.accumulate(lengths[i] for i in sequences)]),
            **options, **denominators,
        )
        out.loss.backward()
        grads = torch.zeros(2, len(q))
        grads[:, rows] = torch.stack([parts_q.grad, parts_v.grad])
        return out.loss.detach(), grads

    whole = run(range(4))
    for split in ([[0], [1], [2], [3]], [[0, 2], [1, 3]], [[3, 1, 0], [2]]):
        parts = [run(part, num_pairs=4, num_actions=len(q)) for part in split]
        for x, y in zip(map(sum, zip(*parts, strict=True)), whole, strict=True):
            assert (error(x, y) <= 4 * FLOAT32_EPS * (1 + y.abs())).all()
        processes = 16
        parts = [run(part, num_pairs=4 / processes, num_actions=len(q) / processes)
                 for part in split]
        for x, y in zip(map(sum, zip(*parts, strict=True)), whole, strict=True):
            assert (error(x / processes, y) <= 4 * FLOAT32_EPS * (1 + y.abs())).all()


def test_inputs_of_other_layouts(backend):
    q, v, offsets = batch(LENGTHS)
    plain = bradley_terry(q, v, offsets, gamma=0.9, backend=backend)
    wide = torch.stack([q, v], 1)
    strided_offsets = offsets.repeat(2, 1).t()[:, 0]
    others = [
        (wide[:, 0], wide[:, 1], offsets), (q, v, offsets.int()), (q, v, strided_offsets),
    ]
    for other in others:
        assert same_bits(bradley_terry(*other, gamma=0.9, backend=backend), plain)


def test_deterministic_to_the_bit(backend):
    """No float atomics: 64 sequences of up to 500 actions, four times."""
    lengths = torch.randint(0, 500, (64,)).tolist()

    def run():
        q, v, offsets = batch(lengths)
        out = bradley_terry(
            q.requires_grad_(), v.requires_grad_(), offsets, chi2_coef=0.1, backend=backend
        )
        out.loss.backward()
        return [*out, q.grad, v.grad]

    first = run()
    assert all(same_bits(run(), first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_summed_in_float32(backend, dtype):
    q, v, offsets = batch([300, 200], dtype=dtype)
    out = bradley_terry(q, v, offsets, backend=backend)
    assert out.loss.dtype == torch.float32
    compare(out, by_hand(q, v, offsets, 1.0, 0.0, "next"), 64 * FLOAT32_EPS)


def test_no_grad_and_repeated_backward(backend):
    q, v, offsets = batch(LENGTHS)
    q.requires_grad_()
    with torch.no_grad():
        assert not bradley_terry(q, v, offsets, backend=backend).loss.requires_grad
    out = bradley_terry(q, v, offsets, backend=backend)
    (first,) = torch.autograd.grad(out.loss, q, retain_graph=True)
    (second,) = torch.autograd.grad(out.loss, q)
    assert torch.equal(first, second)
