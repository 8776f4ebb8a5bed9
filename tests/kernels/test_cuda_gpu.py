"""The compiled CUDA backend on a GPU, against the float64 definition. Skipped without one: there,
``test_cuda_emulated`` runs the same kernels on a CPU."""

from __future__ import annotations

import pytest
import torch
from cases import (
    COEFFICIENTS,
    DTYPES,
    assert_close_as_eager,
    check_linear,
    check_logits,
    linear_case,
    linear_ours,
    logits_case,
    ours,
    same_bits,
)
from rows import check, guarded, guards_hold, row_case, run
from rows import definition as rows_definition

from qadapter_kernels import cuda_backend, reference, soft_value, torch_backend

INF = torch.inf
VOCABULARIES = [1, 7, 1037, 50_257, 128_256]
RESIDUALS = [*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16),
             (torch.float32, torch.float16)]


@pytest.fixture(autouse=True)
def _needs_the_backend():
    if reason := cuda_backend.unavailable_reason("cuda"):
        pytest.skip(reason)


pytestmark = pytest.mark.gpu


def on_gpu(case):
    return case._replace(
        **{name: x.cuda() for name, x in case._asdict().items() if isinstance(x, torch.Tensor)}
    )


# --- logits level -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_logits(name, vocab, dtype):
    case = on_gpu(logits_case(vocab=vocab, dtype=dtype, coef=COEFFICIENTS[name]))
    result = ours(case, "cuda")
    check_logits(result, case)
    check_logits(ours(case, "cuda", base_logsumexp=result.base_logsumexp), case)
    assert same_bits(result, ours(case, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [(0, 0), (3, 3), (1, 2)], ids=str)
def test_logits_of_any_alignment_and_in_place(dtype, offsets):
    case = on_gpu(logits_case(vocab=5333, dtype=dtype))
    a, b = (
        guarded(x, 5341, offset) for x, offset in zip(case[:2], offsets, strict=True)
    )
    case = case._replace(adapter_logits=a, base_logits=b)
    result = ours(case, "cuda")
    check_logits(result, case)
    normalizer = reference.soft_value(a.float(), b, case.actions, case.coef).policy_normalizer
    cuda_backend.logits_backward(
        a, b, case.actions, normalizer, case.grad_q, case.grad_v, case.coef, a
    )
    assert guards_hold(a) and guards_hold(b)
    assert_close_as_eager(a, result.grad, result.grad.float(), 8.0)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_logits_at_the_edge_of_support(name):
    coef = COEFFICIENTS[name]
    case = on_gpu(logits_case(rows=8, vocab=777, coef=coef))
    a, b, actions = case.adapter_logits.clone(), case.base_logits.clone(), case.actions.clone()
    a[0, 3:400], b[1, 30:700] = -INF, -INF
    a[3, actions[3]], b[4, actions[4]] = -INF, -INF
    a[5], b[6] = -INF, -INF
    a[7], b[7], actions[7] = torch.nan, torch.nan, reference.MASKED_ROW
    exact = reference.soft_value(a[:7].double(), b[:7].double(), actions[:7], coef)
    out = cuda_backend.logits_forward(a, b, actions, coef, None, True)
    for x, y in zip(out, exact[:5], strict=False):
        torch.testing.assert_close(x[..., :7].double(), y, rtol=1e-5, atol=1e-5)
        assert (x[..., 7] == 0).all()
    torch.testing.assert_close(
        out[5][:, :7].double(), torch.stack(exact.statistics), rtol=1e-5, atol=2e-5
    )
    grad, plain = torch.full_like(a, torch.nan), torch.empty_like(a)
    for backend, into in ((cuda_backend, grad), (torch_backend, plain)):
        backend.logits_backward(a, b, actions, out[4], case.grad_q, case.grad_v, coef, into)
    torch.testing.assert_close(grad[:7], plain[:7], rtol=1e-5, atol=1e-6)
    assert (grad[7] == 0).all()


def test_more_rows_than_a_grid_has_in_y():
    case = on_gpu(logits_case(rows=70_000, vocab=9))
    check_logits(ours(case, "cuda"), case)
    rows = row_case(rows=70_000, vocab=16, dtype=torch.bfloat16, base=False, device="cuda")
    lse = rows.z.float().mul(rows.scale).logsumexp(-1)
    result = run(cuda_backend, rows, torch.bfloat16, False)
    keep = rows.actions != reference.MASKED_ROW
    torch.testing.assert_close(result.policy_lse[keep], lse[keep])


def test_rows_beyond_two_to_the_31_elements():
    stride = (1 << 31) + 8
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of GPU memory")
    case = on_gpu(logits_case(rows=2, vocab=40, dtype=torch.bfloat16))
    far = torch.empty(stride + 40, dtype=torch.bfloat16, device="cuda")
    far = far.as_strided((2, 40), (stride, 1)).copy_(case.adapter_logits)
    near = cuda_backend.logits_forward(*case[:3], case.coef, None, False)
    assert same_bits(near, cuda_backend.logits_forward(far, *case[1:3], case.coef, None, False))


# --- hidden level -----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtypes", RESIDUALS, ids=lambda x: f"{x[0]}-{x[1]}".replace("torch.", ""))
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("options", ["plain", "base", "bias", "exact", "statistics"])
def test_rows(options, vocab, dtypes, offset):
    """Aligned rows go to the cluster kernel where there are clusters, the others never do."""
    results = []
    for _ in range(2):
        case = row_case(
            vocab=vocab, dtype=dtypes[0], base=options != "plain", bias=options == "bias",
            exact=options in ("exact", "statistics"), offset=offset, device="cuda",
        )
        exact, eager = rows_definition(case), rows_definition(case, torch.float32)
        results.append(run(cuda_backend, case, dtypes[1], options == "statistics"))
        check(results[-1], exact, eager)
        assert dtypes[0] != dtypes[1] or guards_hold(case.z)
    assert same_bits(*results)


@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_many_clusters(rows, dtype):
    """More rows than are in flight at once."""
    case = row_case(rows=rows, vocab=128_256, dtype=dtype, base=False, device="cuda")
    u = case.z.float() * case.scale
    keep = case.actions != reference.MASKED_ROW
    expected = u[keep].softmax(-1)
    expected -= torch.nn.functional.one_hot(case.actions[keep].clamp_min(0), 128_256) * (
        case.actions[keep, None] >= 0
    )
    result = run(cuda_backend, case, torch.bfloat16, False)
    torch.testing.assert_close(result.policy_lse[keep], u[keep].logsumexp(-1))
    torch.testing.assert_close(result.residual[keep].float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_hidden_level(name, dtype):
    case = on_gpu(linear_case(vocab=1037, dtype=dtype, coef=COEFFICIENTS[name], bias=name == "q"))
    check_linear(linear_ours(case, "cuda"), case)


# --- sequence loss, decoding ------------------------------------------------------------------


@pytest.mark.parametrize("bootstrap_next", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_bradley_terry(bootstrap_next, gamma):
    lengths = torch.tensor([3, 1, 0, 4, 1000, 7000], device="cuda")
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    n = int(offsets[-1])
    numbers = (gamma, 0.3, bootstrap_next, 1 / 3, 1 / n)
    sizes = (n, n, 3, 6, n)  # q, V, and the gradients of losses, sequence and token rewards
    inputs = [lengths.clamp_min(1).float(), *(torch.randn(k, device="cuda") for k in sizes)]
    results = []
    for backend, dtype in ((cuda_backend, torch.float32), (torch_backend, torch.float64)):
        divisors, q, v, *grads = (x.to(dtype) for x in inputs)
        forward = backend.bradley_terry_forward(q, v, offsets, divisors, *numbers)
        backward = backend.bradley_terry_backward(
            forward[2], forward[1], offsets, divisors, *numbers, *grads
        )
        results.append((*forward, *backward))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_combine_logits(name, vocab, dtype):
    case = on_gpu(logits_case(rows=5, vocab=vocab, dtype=dtype, coef=COEFFICIENTS[name]))
    for strength in (None, torch.tensor([0.0, 1.0, 0.4, 1.7, -0.5], device="cuda")):
        double = None if strength is None else strength.double()
        exact = torch_backend.combine_logits(*(x.double() for x in case[:2]), case.coef, double)
        logp = cuda_backend.combine_logits(*case[:2], case.coef, strength)
        torch.testing.assert_close(logp.double(), exact, rtol=5e-6, atol=5e-5)


# --- as PyTorch uses it -----------------------------------------------------------------------


def test_no_rows():
    case = on_gpu(logits_case(rows=0))
    assert all(x.numel() == 0 for x in ours(case, "cuda"))
    rows = row_case(rows=0, device="cuda")
    assert run(cuda_backend, rows, torch.float32, True).statistics.shape == (3, 0)


def test_a_graph_captures_every_kernel():
    """Nothing waits, nothing is allocated but through PyTorch: replays follow new inputs."""
    case = on_gpu(logits_case(rows=4, vocab=1024, dtype=torch.bfloat16))
    z = torch.empty(4, 128_256, dtype=torch.bfloat16, device="cuda")
    offsets = torch.tensor([0, 1, 2, 3, 4], device="cuda")
    ones = torch.ones(4, device="cuda")

    def step():
        outputs = cuda_backend.logits_forward(*case[:3], case.coef, None, True)
        grad = torch.empty_like(case.adapter_logits)
        cuda_backend.logits_backward(*case[:3], outputs[4], ones, ones, case.coef, grad)
        z.copy_(case.adapter_logits.repeat(1, 126)[:, :128_256])
        rows = cuda_backend.rows_forward(
            z, None, case.actions, 1.0, None, 1.0, None, True, torch.bfloat16, False
        )
        numbers = (1.0, 0.1, True, 0.5, 0.25)
        loss = cuda_backend.bradley_terry_forward(*outputs[:2], offsets, ones, *numbers)
        grads = cuda_backend.bradley_terry_backward(
            loss[2], loss[1], offsets, ones, *numbers, ones[:3], ones, ones
        )
        logp = cuda_backend.combine_logits(*case[:2], case.coef, ones)
        return *outputs, grad, *rows, z.clone(), *loss, *grads, logp

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # also: launches go to the current stream
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        case.adapter_logits.copy_(torch.randn_like(case.adapter_logits))
        graph.replay()
        assert same_bits(captured, step())


def test_it_stays_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = logits_case(vocab=1037)
    case = case._replace(
        **{n: x.to("cuda:1") for n, x in case._asdict().items() if isinstance(x, torch.Tensor)}
    )
    check_logits(ours(case, "cuda"), case)


def test_compiled_equals_eager():
    case = on_gpu(logits_case(rows=4, vocab=1024, dtype=torch.bfloat16))

    def call(a):
        return soft_value(a, *case[1:3], **case.coef._asdict(), backend="cuda")

    assert same_bits(call(case.adapter_logits), torch.compile(call, fullgraph=True)(case[0]))
