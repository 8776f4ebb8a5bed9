"""Triton's compiled kernels on a GPU, at real sizes: what the interpreter can't say.

The interpreter runs one program after another, so races, memory beyond 2³¹ elements, recompilation
and CUDA graphs are seen here only. Every test is marked ``gpu`` and skipped without one; without
the mark they also run in the interpreter, at its sizes.
"""

from __future__ import annotations

import interpreter  # first: it decides how triton is imported
import pytest
import torch
from cases import COEFFICIENTS, FLOAT32_EPS, error, same_bits
from interpreter import DEVICE, INTERPRETED

from qadapter_kernels import bradley_terry, linear_soft_value, reference, soft_value, torch_backend
from qadapter_kernels import triton as backend_module

pytestmark = [pytest.mark.gpu, interpreter.quiet]
VOCAB = 1040 if INTERPRETED else 128_256
ODD = 1033 if INTERPRETED else 50_257
MANY = 4 if INTERPRETED else 600
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture(autouse=True)
def _prepare(monkeypatch):
    interpreter.prepare(monkeypatch)


def logits(rows: int, vocab: int, dtype: torch.dtype = torch.bfloat16, scale: float = 3.0):
    return (scale * torch.randn(rows, vocab, device=DEVICE)).to(dtype)


def per_row(rows: int, vocab: int):
    """Actions (none in the second row, the third masked out), and upstream gradients."""
    actions = torch.randint(vocab, (rows,), device=DEVICE)
    actions[0], actions[1:2], actions[2:3] = vocab - 1, -1, reference.MASKED_ROW
    return actions, torch.randn(rows, device=DEVICE), torch.randn(rows, device=DEVICE)


@pytest.mark.parametrize("vocab", [VOCAB, ODD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [3, MANY])
def test_soft_value(rows, dtype, vocab):
    """Split and whole rows, both arrangements of lanes, forward, statistics, backward in place."""
    coef = COEFFICIENTS["policy_dial"]
    a, b = logits(rows, vocab, dtype), logits(rows, vocab, dtype)
    actions, grad_q, grad_v = per_row(rows, vocab)
    out = backend_module.logits_forward(a, b, actions, coef, None, True)
    exact = torch_backend.logits_forward(a.double(), b.double(), actions, coef, None, True)
    for x, y in zip(out, exact, strict=True):
        assert error(x, y).max() < 64 * FLOAT32_EPS * 30
    expected = torch.empty_like(a, dtype=torch.float64)
    torch_backend.logits_backward(
        a.double(), b.double(), actions, exact[4], grad_q.double(), grad_v.double(), coef, expected
    )
    backend_module.logits_backward(a, b, actions, out[4], grad_q, grad_v, coef, a)
    half_a_rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    smallest = torch.finfo(dtype).smallest_normal
    allowed = half_a_rounding * expected.abs() + 64 * FLOAT32_EPS * 30 + smallest
    assert (error(a, expected) <= allowed).all()


@pytest.mark.parametrize("vocab", [VOCAB, ODD])
@pytest.mark.parametrize("stores", [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16,) * 2,
], ids=str)
def test_rows_in_place(stores, vocab):
    """P′ over z while 32 warps read z: a race would show as a difference, if not in every run."""
    z_dtype, residual_dtype = stores
    z, zb = logits(2 * MANY, vocab, z_dtype), logits(2 * MANY, vocab, z_dtype)
    actions = per_row(2 * MANY, vocab)[0]
    expected = z.double()
    rest = (actions, 0.7, None, 1.3, None, True)
    exact = torch_backend.rows_forward(expected, zb.double(), *rest, torch.float64, True)
    for _ in range(3):
        work = z.clone()
        out = backend_module.rows_forward(work, zb, *rest, residual_dtype, True)
        for x, y in zip(out, exact, strict=True):
            assert error(x, y).max() < 64 * FLOAT32_EPS * 30
        residual = torch_backend.residual_view(work, residual_dtype)
        allowed = torch.finfo(residual_dtype).eps / 2 * expected.abs() + 32 * FLOAT32_EPS * 12
        assert (error(residual, expected) <= allowed).all()


def test_more_elements_than_2_31_and_more_rows_than_65_535():
    rows, vocab = (3, 600) if INTERPRETED else (70_001, 32_064)  # 2.2e9 elements
    coef = COEFFICIENTS["policy_dial"]
    a = logits(1, vocab).expand(rows, vocab).contiguous()
    actions = torch.full((rows,), vocab - 1, device=DEVICE)
    out = backend_module.logits_forward(a, a, actions, coef, None, False)
    one = torch.ones(rows, device=DEVICE)
    assert all(torch.equal(x, x[..., :1].expand_as(x)) for x in out[:5])
    backend_module.logits_backward(a, a, actions, out[4], one, -one, coef, a)
    assert torch.equal(a[-1], a[0]) and torch.equal(a[rows // 2], a[0])


@pytest.mark.parametrize("bootstrap", ["next", "current"])
def test_bradley_terry(bootstrap):
    """Thousands of programs arrive in any order; the sum has one value."""
    pairs = 4 if INTERPRETED else 4000
    lengths = torch.randint(0, 60, (2 * pairs,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    rows = int(offsets[-1])
    q = torch.randn(rows, device=DEVICE, requires_grad=True)
    v = torch.randn(rows, device=DEVICE, requires_grad=True)
    options = dict(gamma=0.9, chi2_coef=0.3, bootstrap=bootstrap)

    def run(q, v, backend):
        out = bradley_terry(q, v, offsets, **options, backend=backend)
        return *(x.detach() for x in out), *torch.autograd.grad(out.loss, (q, v))

    first = run(q, v, "triton")
    for x, y in zip(first, run(q.double(), v.double(), "torch"), strict=True):
        assert error(x, y).max() < 64 * FLOAT32_EPS * (1 + float(y.abs().max()))
    assert all(same_bits(cpu(run(q, v, "triton")), cpu(first)) for _ in range(5))


def cpu(tensors):
    return [x.cpu() for x in tensors]


def test_hidden_level():
    """Through cuBLAS with float32 logits, narrowed in place, against float64 products."""
    hidden, coef = 64, COEFFICIENTS["policy_dial"]
    h, hb = (torch.randn(MANY, hidden, device=DEVICE).bfloat16() for _ in range(2))
    weight = (torch.randn(VOCAB, hidden, device=DEVICE) / 4).bfloat16()
    actions = torch.randint(VOCAB, (MANY,), device=DEVICE)

    def run(cast, backend):
        leaf = h.to(cast).requires_grad_()
        out = linear_soft_value(
            leaf, hb.to(cast), weight.to(cast), actions, **coef._asdict(), backend=backend,
            workspace_mb=64,
        )
        grad = torch.autograd.grad(out.q_action.sum() - 0.9 * out.value.sum(), leaf)
        return *(x.detach() for x in out), *grad

    exact = run(torch.float64, "torch")
    # Stored logits are exact to float32 on a GPU; on the CPU they are bfloat16 products.
    loss = 0.1 if INTERPRETED else 0.01
    for x, y in zip(run(torch.bfloat16, "triton"), exact, strict=True):
        assert error(x, y).max() < loss * (1 + float(y.abs().max()))


def test_combine_and_sample():
    """Everything that is drawn survives Hugging Face's filters; ties aside, exactly."""
    from transformers.generation import logits_process as hf

    rows = 2 if INTERPRETED else 64
    a, b = logits(rows, VOCAB), logits(rows, VOCAB)
    coef, strength = COEFFICIENTS["policy_dial"], torch.linspace(0, 2, rows, device=DEVICE)
    logprobs = backend_module.combine_logits(a, b, coef, strength)
    exact = torch_backend.combine_logits(a.double(), b.double(), coef, strength.double())
    assert error(logprobs, exact).max() < 64 * FLOAT32_EPS * 40
    scores = logprobs.double() / 0.7
    for warper in (hf.TopKLogitsWarper(50), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.02)):
        scores = warper(None, scores)
    weakest = logprobs.masked_fill(scores == -torch.inf, torch.inf).amin(-1)
    for offset in range(2 if INTERPRETED else 50):
        tokens = backend_module.sample(logprobs, 0.7, 50, 0.9, 0.02, 3, offset)
        assert (logprobs.gather(1, tokens[:, None])[:, 0] >= weakest).all()


@compiled_only
def test_ten_lengths_compile_once(monkeypatch):
    """Numbers of rows are run-time arguments: after the first, no new kernel."""
    import triton

    compilations, after_first = [], None
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compilations.append(kwargs)
    )
    for rows in (300, 301, 512, 777, 1024, 1031, 2000, 2048, 3001, 4096):
        a = logits(rows, 2048).requires_grad_()
        actions = torch.randint(2048, (rows,), device=DEVICE)
        out = soft_value(
            a, logits(rows, 2048), actions, alpha_0=0.1 + rows / 1e4, backend="triton"
        )
        offsets = torch.tensor([0, rows // 2, rows], device=DEVICE)
        loss = bradley_terry(*out[:2], offsets, gamma=rows / 1e4, backend="triton").loss
        loss.backward()
        after_first = after_first or len(compilations)
    assert after_first and len(compilations) == after_first


@compiled_only
def test_cuda_graph():
    """Captured once, replayed on new inputs: no synchronization, no state between calls."""
    a, b = logits(300, 4096), logits(300, 4096)
    actions = torch.randint(4096, (300,), device=DEVICE)
    offsets, coef = torch.tensor([0, 140, 300], device=DEVICE), COEFFICIENTS["policy_dial"]
    divisors = torch.ones(2, device=DEVICE)
    options = (0.9, 0.1, True, 1.0, 1 / 300)

    def step():
        q, v, _, _, normalizer, _ = backend_module.logits_forward(a, b, actions, coef, None, True)
        losses, returns, rewards = backend_module.bradley_terry_forward(
            q, v, offsets, divisors, *options
        )
        grads = backend_module.bradley_terry_backward(
            rewards, returns, offsets, divisors, *options, torch.ones_like(losses),
            torch.zeros_like(returns), torch.zeros_like(rewards),
        )
        out = torch.empty_like(a)
        backend_module.logits_backward(a, b, actions, normalizer, *grads, coef, out)
        return losses, out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        a.copy_(logits(300, 4096))
        graph.replay()
        assert same_bits(cpu(captured), cpu(step()))
