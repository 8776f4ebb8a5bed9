"""Every operator at a language model's sizes: thousands of rows, Llama 3's vocabulary, bfloat16.

On a GPU, for each of its backends. Where there is none the same tests run at small sizes for the
backends of a CPU, so that they are known to be right before a GPU sees them. Judged in blocks of
rows: float64 logits of all of them at once would not fit.
"""

from __future__ import annotations

import pytest
import scores
import torch
from cases import (
    COEFFICIENTS,
    CPU_BACKENDS,
    FLOAT32_EPS,
    Result,
    check_linear,
    check_logits,
    error,
    linear_case,
    linear_definition,
    linear_ours,
    logits_case,
    ours,
    same_bits,
)
from torch import Tensor

from qadapter_kernels import bradley_terry, dispatch, linear_logsumexp, torch_backend
from qadapter_kernels.reference import ScoreRows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROWS, BLOCK = (4096, 256) if GPU else (70, 32)
VOCAB = 128_256 if GPU else 1031
HEADS = {"Llama-3.1-8B": 4096, "Llama-3.2-1B": 2048} if GPU else {"wide": 96, "narrow": 48}
"""Hidden sizes."""
BACKENDS = ("triton", "cuda") if GPU else CPU_BACKENDS

if GPU:
    pytestmark = pytest.mark.gpu


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    if reason := dispatch.load(request.param).unavailable_reason(DEVICE):
        pytest.skip(reason)
    return request.param


def blocks(num_rows: int = ROWS) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, num_rows, BLOCK)]


def rows_of(case, rows: slice, names: tuple[str, ...]):
    return case._replace(**{name: getattr(case, name)[rows] for name in names})


def lost_in_products(hidden: int, size: Tensor) -> float:
    """The most that a log-sum-exp of this size may be off by: a GPU's logits are float32 sums of D
    products, in an order of its own; a CPU's are rounded to 16 bits."""
    relative = 4 * hidden**0.5 * FLOAT32_EPS if GPU else torch.finfo(torch.bfloat16).eps / 2
    return relative * (1 + float(size.abs().max()))


@pytest.mark.parametrize("name", ["q", "policy", "policy_dial"])
def test_logits_level(backend, name):
    case = logits_case(ROWS, VOCAB, torch.bfloat16, coef=COEFFICIENTS[name], device=DEVICE)
    result = ours(case, backend)
    for rows in blocks():
        part = rows_of(case, rows, case._fields[:-1])
        check_logits(Result(*(x[rows] for x in result)), part)
    assert same_bits(result, ours(case, backend))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["q", "policy_dial"])
def test_hidden_level(backend, head, name):
    """The library's products, chunks and workspace with the backend's row kernel."""
    case = linear_case(
        ROWS, VOCAB, HEADS[head], torch.bfloat16, coef=COEFFICIENTS[name], device=DEVICE
    )
    result = linear_ours(case, backend)
    for rows in blocks():
        part = rows_of(case, rows, ("adapter_hidden", "base_hidden", "actions", "grad_q", "grad_v"))
        check_linear(Result(*(x[rows] for x in result)), part)
    cached = linear_ours(case, backend, base_logsumexp=result.base_logsumexp)
    allowed = lost_in_products(HEADS[head], result.base_logsumexp)
    assert error(cached.value, result.value).max() <= 2 * case.coef.alpha_tilde * allowed
    assert same_bits(result, linear_ours(case, backend))


def test_logsumexp(backend):
    hidden = next(iter(HEADS.values()))
    case = linear_case(ROWS, VOCAB, hidden, torch.bfloat16, device=DEVICE)
    found = linear_logsumexp(case.base_hidden, case.weight, case.actions, backend=backend)
    for rows in blocks():
        part = rows_of(case, rows, ("adapter_hidden", "base_hidden", "actions", "grad_q", "grad_v"))
        exact = linear_definition(part).base_logsumexp
        assert error(found[rows], exact).max() <= lost_in_products(hidden, exact)


@pytest.mark.parametrize("objective", ["policy", "q"])
def test_state_scores(backend, objective):
    if not hasattr(dispatch.load(backend), "score_rows"):
        pytest.skip(f"the {backend} backend has no scores")
    hidden = min(HEADS.values())
    case = scores.score_case(
        objective, 0.5, rows=ROWS, vocab=VOCAB, hidden=hidden, device=DEVICE
    )
    found, differing = scores.run(case, backend), 0
    for rows in blocks():
        part = rows_of(case, rows, ("adapter_hidden", "base_hidden", "actions"))
        result = ScoreRows(*(x[rows] for x in found))
        same = scores.definition(part).same_top1 != 0
        differing += int((same != (result.same_top1 != 0)).sum())
        scores.check(result._replace(same_top1=same.float()), part)
    assert differing <= ROWS / 1000  # two logits closer than their rounding, now and then
    assert same_bits(found, scores.run(case, backend))


@pytest.mark.parametrize("bootstrap", ["next", "current"])
def test_sequence_loss(backend, bootstrap):
    """A long sequence among thousands of short and empty ones."""
    pairs = 1000 if GPU else 10
    lengths = torch.randint(0, 64, (2 * pairs,))
    lengths[3] = 20_000 if GPU else 700
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    q, value = (torch.randn(int(offsets[-1]), device=DEVICE) for _ in range(2))

    def run(dtype: torch.dtype, name: str) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, value)]
        out = bradley_terry(
            *leaves, offsets, gamma=0.98, chi2_coef=0.1, bootstrap=bootstrap,
            length_normalization="completion", backend=name,
        )
        return [*(x.detach() for x in out), *torch.autograd.grad(out.loss, leaves)]

    found = run(torch.float32, backend)
    for x, exact in zip(found, run(torch.float64, "torch"), strict=True):
        assert error(x, exact).max() <= 64 * FLOAT32_EPS * (1 + float(exact.abs().max()))
    assert same_bits(found, run(torch.float32, backend))


def test_decoding(backend):
    coef, count = COEFFICIENTS["policy_dial"], min(ROWS, 64)
    case = logits_case(count, VOCAB, torch.bfloat16, coef=coef, device=DEVICE)
    strength = torch.linspace(0, 2, count, device=DEVICE)
    found = dispatch.load(backend).combine_logits(*case[:2], coef, strength)
    exact = torch_backend.combine_logits(
        *(x.double() for x in case[:2]), coef, strength.double()
    )
    assert error(found, exact).max() <= 64 * FLOAT32_EPS * (1 + float(exact.abs().max()))
