"""The logits level in Triton: the hostile list of ``test_ops`` by name, and Triton's own."""

from __future__ import annotations

import interpreter  # first: it decides how triton is imported
import pytest
import test_ops
import torch
from cases import (
    COEFFICIENTS,
    FLOAT32_EPS,
    Case,
    Result,
    check_logits,
    definition,
    error,
    logits_case,
    ours,
    same_bits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, on_device

from qadapter_kernels import Coefficients, reference, soft_value, torch_backend
from qadapter_kernels import triton as backend_module
from qadapter_kernels.triton import launch

pytestmark = interpreter.quiet
INF = torch.inf


@pytest.fixture(autouse=True)
def _prepare(monkeypatch):
    interpreter.prepare(monkeypatch)


@pytest.fixture
def backend():
    """For the tests taken over from ``test_ops``: they run on CPU tensors."""
    if not interpreter.INTERPRETED:
        pytest.skip("CPU tensors need the interpreter; test_triton_gpu has the compiled kernels")
    return "triton"


# The day-one list (design §6), as every backend has to pass it. Strides, padding, far offsets,
# determinism and more than 65,535 rows have a form of their own below: there are two arrangements
# of lanes to go through, and the interpreter bears fewer rows.
test_equals_the_definition = test_ops.test_equals_the_definition
test_odd_vocabularies = test_ops.test_odd_vocabularies
test_statistics = test_ops.test_statistics
test_minus_infinity_in_some_columns = test_ops.test_minus_infinity_in_some_columns
test_minus_infinity_at_the_action = test_ops.test_minus_infinity_at_the_action
test_rows_of_minus_infinity = test_ops.test_rows_of_minus_infinity
test_base_rows_of_minus_infinity = test_ops.test_base_rows_of_minus_infinity
test_alpha_0_zero_with_infinite_base = test_ops.test_alpha_0_zero_with_infinite_base
test_statistics_with_disjoint_support = test_ops.test_statistics_with_disjoint_support
test_missing_upstream_gradients = test_ops.test_missing_upstream_gradients
test_upstream_gradients_of_every_kind = test_ops.test_upstream_gradients_of_every_kind
test_no_rows = test_ops.test_no_rows
test_float16_does_not_overflow = test_ops.test_float16_does_not_overflow
test_last_column_as_action = test_ops.test_last_column_as_action
test_actions_of_any_integer_dtype = test_ops.test_actions_of_any_integer_dtype
test_masked_rows_are_not_read = test_ops.test_masked_rows_are_not_read
test_cached_base_logsumexp = test_ops.test_cached_base_logsumexp
test_repeated_and_out_of_order_backward = test_ops.test_repeated_and_out_of_order_backward
test_in_place_backward = test_ops.test_in_place_backward_writes_over_the_logits
test_no_grad = test_ops.test_no_grad
test_autocast_changes_nothing = test_ops.test_autocast_changes_nothing
test_bfloat16_peaked_rows = test_ops.test_bfloat16_peaked_rows
test_large_common_offsets = test_ops.test_large_common_offsets


# --- what only Triton has ----------------------------------------------------------------------


def run(case: Case, **options) -> Result:
    """Forward and backward on the device under test, results on the CPU."""
    a, b, actions, grad_q, grad_v = on_device(*case[:5])
    a.requires_grad_()
    out = soft_value(a, b, actions, **case.coef._asdict(), backend="triton", **options)
    (grad,) = torch.autograd.grad([out.q_action, out.value], a, [grad_q, grad_v])
    return Result(*(x.detach().cpu() for x in (*out, grad)))


def rows_of(case: Case, rows: slice) -> Case:
    return case._replace(**{
        name: getattr(case, name)[rows]
        for name in ("adapter_logits", "base_logits", "actions", "grad_q", "grad_v")
    })


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("vocab", [2603, 2608])
def test_split_rows_equal_whole_ones(monkeypatch, vocab, statistics):
    """Few rows are split over programs and combined; the sums only change their order."""
    case = logits_case(3, vocab, torch.bfloat16, coef=COEFFICIENTS["policy_dial"])
    a, b, actions = on_device(*case[:3])

    def forward():
        return backend_module.logits_forward(a, b, actions, case.coef, None, statistics)

    if interpreter.INTERPRETED:
        split = launch.split_rows(3, vocab, launch.TILES["soft_value_forward"], a.device)
        assert split == launch.Split(6, 1)
    parts = forward()
    monkeypatch.setattr(launch, "split_rows", lambda *_: launch.Split(1, 4096))
    for x, y in zip(parts, forward(), strict=True):
        assert ((x - y).abs() <= 16 * FLOAT32_EPS * 30).all()


@pytest.mark.parametrize("vocab", [530, 528])
def test_row_strides(backend, vocab):
    """Slices of a batch, every third row, one row for all: same bits as their copies (in one and
    the other arrangement of lanes: 528 columns are aligned, 530 are not)."""
    wide = torch.randn(4, 6, vocab)
    for view in (wide[:, 2], wide.flatten(0, 1)[::6], torch.randn(vocab).expand(4, vocab)):
        case = logits_case(rows=4, vocab=vocab, coef=COEFFICIENTS["policy_dial"])
        strided = case._replace(adapter_logits=view, base_logits=view)
        copied = case._replace(adapter_logits=view.contiguous(), base_logits=view.contiguous())
        assert same_bits(ours(strided, backend), ours(copied, backend))


def test_padded_weights(backend):
    """The logits of a padded head, cut to the vocabulary: the tail is never counted."""
    case = logits_case(rows=4, vocab=601, dtype=torch.bfloat16)
    padded = torch.full((4, 640), 1e4, dtype=torch.bfloat16)
    padded[:, :601] = case.adapter_logits
    check_logits(ours(case._replace(adapter_logits=padded[:, :601]), backend), case)


@pytest.mark.parametrize("vocab", [520, 528])
def test_offsets_beyond_2_31_elements(vocab):
    """Three rows 2³⁰ + 16 elements apart: row and stride fit 32 bits and their product does not.
    The memory between the rows is never touched."""
    stride = 2**30 + 16
    far = torch.empty(2 * stride + vocab, dtype=torch.bfloat16, device=DEVICE)
    far = far.as_strided((3, vocab), (stride, 1))
    case = logits_case(rows=3, vocab=vocab, dtype=torch.bfloat16)
    near, b, actions, grad_q, grad_v = on_device(*case[:5])
    far.copy_(near)
    outputs = []
    for a in (near, far):
        out = backend_module.logits_forward(a, b, actions, case.coef, None, False)
        backend_module.logits_backward(a, b, actions, out[4], grad_q, grad_v, case.coef, a)
        outputs.append((*out, a))
    assert same_bits(*outputs)


def test_deterministic_to_the_bit():
    """Run to run, split or not: no atomics, every sum in a fixed order."""
    case = logits_case(rows=3, vocab=2603, dtype=torch.bfloat16)
    first = run(case)
    assert all(same_bits(run(case), first) for _ in range(2))


def test_split_follows_the_number_of_rows():
    tile, device = launch.Tile(4096, 8), torch.device("cpu")
    splits = [launch.split_rows(n, 128_256, tile, device).programs for n in (1, 8, 64, 200, 300)]
    assert splits == [32, 32, 4, 1, 1]
    for rows in range(1, 300):
        split = launch.split_rows(rows, 128_256, tile, device)
        covered = split.programs * split.tiles_each * tile.columns
        assert covered >= 128_256 > covered - split.tiles_each * tile.columns
        assert split.programs <= launch.MAX_SPLITS


def test_nothing_found_in_a_part_of_a_split_row():
    """Whole parts without support, the first and the last among them, and statistics over them."""
    case = logits_case(rows=2, vocab=1500, scale=2.0, coef=COEFFICIENTS["policy_dial"])
    case.adapter_logits[:, :600] = -INF
    case.adapter_logits[:, 1400:] = -INF
    case = case._replace(actions=torch.tensor([700, 1399]))
    result, exact = run(case), definition(case)
    for x, y in zip(result, exact, strict=True):
        assert (error(x, y) < 64 * FLOAT32_EPS * 20).all()


def test_more_rows_than_a_grid_dimension(monkeypatch):
    """CUDA's y and z end at 65,535: rows and tiles are both counted on x, in one dimension."""
    grids = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *args, **kwargs: grids.append(grid))
    a = torch.empty(1, 600, device=DEVICE).expand(70_000, 600)
    row = torch.empty(70_000, device=DEVICE)
    coef = COEFFICIENTS["q"]
    backend_module.logits_forward(a, a, row.long(), coef, None, True)
    backend_module.logits_backward(a, a, row.long(), row.expand(2, -1), row, row, coef, a)
    backend_module.rows_forward(a, None, row.long(), 1.0, None, 1.0, None, True, a.dtype, False)
    tiles = -(-600 // launch.TILES["soft_value_backward"].columns)
    assert grids == [(70_000,), (70_000 * tiles,), (70_000,)]


def test_scalars_are_arguments_and_not_compiled_in(monkeypatch):
    """A sweep over α's, row counts and divisors meets the same constants: nothing recompiles."""
    constants = []
    monkeypatch.setattr(
        launch, "launch", lambda kernel, *args, **kwargs: constants.append((kernel, kwargs))
    )
    for rows, alpha in ((300, 0.3), (301, 0.7), (1024, 0.11)):
        a, row = torch.empty(rows, 700, device=DEVICE), torch.empty(rows, device=DEVICE)
        coef = Coefficients(alpha, 1.0 + alpha, alpha, alpha / 2)
        backend_module.logits_forward(a, a, row.long(), coef, None, False)
        backend_module.logits_backward(a, a, row.long(), row.expand(2, -1), row, row, coef, a)
    assert constants[:2] == constants[2:4] == constants[4:]


def test_in_place_gradient_equals_the_other(monkeypatch):
    case = logits_case(rows=4, vocab=777, dtype=torch.bfloat16, coef=COEFFICIENTS["policy_dial"])
    a, b, actions, grad_q, grad_v = on_device(*case[:5])
    normalizer = backend_module.logits_forward(a, b, actions, case.coef, None, False)[4]
    apart = torch.empty_like(a)
    rest = (normalizer, grad_q, grad_v, case.coef)
    backend_module.logits_backward(a, b, actions, *rest, apart)
    backend_module.logits_backward(a, b, actions, *rest, a)
    assert torch.equal(a, apart)
    strided = torch.zeros(4, 1000, dtype=torch.bfloat16, device=DEVICE)  # a row stride of its own
    backend_module.logits_backward(on_device(case.adapter_logits)[0], b, actions, *rest,
                                   strided[:, 100:877])
    assert torch.equal(strided[:, 100:877], apart)
    assert not strided[:, :100].any() and not strided[:, 877:].any()


def test_adapter_without_weight():
    """c_a = 0: the policy is the base's alone, a is not read, its gradient is 0."""
    case = logits_case(rows=3, vocab=300, coef=Coefficients(0.5, 0.8, 0.0, 0.3))
    _, b, actions, grad_q, grad_v = on_device(*case[:5])
    unread = torch.full_like(b, torch.nan)
    q, value, _, _, normalizer, _ = backend_module.logits_forward(
        unread, b, actions, case.coef, None, False
    )
    exact = reference.soft_value(case.adapter_logits.double(), case.base_logits.double(),
                                 case.actions, case.coef)
    assert error(q.cpu(), exact.q_action).max() < 1e-5
    assert error(value.cpu(), exact.value).max() < 1e-5
    backend_module.logits_backward(
        unread, b, actions, normalizer, grad_q, grad_v, case.coef, unread
    )
    assert not unread.any()


def test_streams_of_no_weight_at_all():
    """c_a = 0 and c_b + α₀ = 0: a uniform policy over all columns, and over no padding."""
    case = logits_case(rows=3, vocab=300, coef=Coefficients(0.5, 0.8, 0.0, -0.5))
    value = backend_module.logits_forward(*on_device(*case[:3]), case.coef, None, False)[1]
    expected = 0.8 * torch.log(torch.tensor(300.0)) - 0.5 * case.base_logits.logsumexp(-1)
    assert error(value.cpu(), expected).max() < 1e-5


@pytest.mark.parametrize("name", ["policy", "policy_dial"])
def test_statistics_see_support_and_not_underflow(name):
    """π̃ is e⁻²⁰⁰ at a column that π excludes: 0 in float32, and KL(π̃‖π) is +inf all the same."""
    case = logits_case(rows=2, vocab=520, scale=1.0, coef=COEFFICIENTS[name])
    case.adapter_logits[0, 3] = 400.0 * case.coef.alpha_tilde
    case.base_logits[0, 5] = -INF
    a, b, actions = on_device(*case[:3])
    stats = backend_module.logits_forward(a, b, actions, case.coef, None, True)[5].cpu()
    exact = reference.soft_value(
        case.adapter_logits.double(), case.base_logits.double(), case.actions, case.coef
    ).statistics
    for x, y in zip(stats, exact, strict=True):
        assert (error(x, y) < 1e-3).all()
    if name == "policy":
        assert stats[1, 0] == INF


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_values_with_infinities_and_offsets(data):
    """Shapes, strides, coefficients, a common offset a row, −inf anywhere: never a NaN, and equal
    to the definition."""
    rows, vocab = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 700))
    coef = Coefficients(
        data.draw(st.sampled_from([0.0, 0.01, 1.0])), data.draw(st.floats(0.1, 3.0)),
        data.draw(st.floats(0.1, 2.0)), data.draw(st.sampled_from([0.0, -0.01, -1.0, 0.4])),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    case = logits_case(rows, vocab, torch.float32, data.draw(st.sampled_from([0.1, 3.0, 15.0])),
                       coef, data.draw(st.integers(0, 999)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    offset = data.draw(st.sampled_from([0.0, -300.0, 1000.0]))
    streams = []
    for logits in case[:2]:
        excluded = torch.rand(rows, vocab, generator=generator) < data.draw(
            st.sampled_from([0.0, 0.1, 0.9, 1.0])
        )
        padded = torch.full((rows, vocab + data.draw(st.integers(0, 9))), 1e4)
        padded[:, :vocab] = torch.where(excluded, -INF, logits + offset)
        streams.append(padded.to(dtype)[:, :vocab])
    case = case._replace(adapter_logits=streams[0], base_logits=streams[1])
    result, exact = run(case), definition(case)
    size = (abs(offset) + 60) * (coef.adapter_coef + abs(coef.base_coef) + 2 * coef.alpha_0)
    upstream = max(case.grad_q.abs().max(), case.grad_v.abs().max())
    kept = ~((streams[0] == -INF) | (streams[1] == -INF))  # see test_ops.check_infinite
    for name, x, y in zip(Result._fields[:4], result[:4], exact[:4], strict=True):
        assert (error(x, y) <= 16 * FLOAT32_EPS * size).all(), name
    assert not result.grad.isnan().any()
    own = torch.finfo(dtype)
    roundings = own.eps / 2 if own.bits < 32 else 0.0
    allowed = coef.adapter_coef * upstream * (
        16 * FLOAT32_EPS * size / coef.alpha_tilde + 2 * roundings
    ) + own.smallest_normal
    assert (error(result.grad, exact.grad)[kept] <= allowed).all()


def test_wrong_inputs_are_named():
    double = torch.zeros(2, 8, dtype=torch.float64, device=DEVICE)
    row, coef = torch.zeros(2, dtype=torch.int64, device=DEVICE), COEFFICIENTS["q"]
    with pytest.raises(TypeError, match=r"adapter_logits: .*not torch\.float64"):
        backend_module.logits_forward(double, double, row, coef, None, False)
    columns = torch.zeros(8, 2, device=DEVICE).t()
    with pytest.raises(ValueError, match=r"adapter_logits: want .*adjacent columns"):
        backend_module.logits_forward(columns, columns, row, coef, None, False)


def test_unavailable_reason(monkeypatch):
    if interpreter.INTERPRETED:
        assert backend_module.unavailable_reason("cpu") is None
        assert "GPU" in backend_module.unavailable_reason("cuda")
    else:
        assert backend_module.unavailable_reason("cuda") is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET" in backend_module.unavailable_reason("cpu")
    assert "mps" in backend_module.unavailable_reason("mps")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in backend_module.unavailable_reason("cuda")


def test_the_backend_agrees_with_the_torch_backend_row_by_row():
    """Every output of the interface, the normalizer and masked rows included."""
    case = logits_case(rows=5, vocab=515, coef=COEFFICIENTS["policy_dial"])
    case.actions[4] = reference.MASKED_ROW
    a, b, actions = on_device(*case[:3])
    out = backend_module.logits_forward(a, b, actions, case.coef, None, True)
    exact = torch_backend.logits_forward(
        case.adapter_logits.double(), case.base_logits.double(), case.actions, case.coef, None, True
    )
    for x, y in zip(out, exact, strict=True):
        assert x.dtype == torch.float32 and error(x.cpu(), y).max() < 1e-4
        assert not x[..., 4].any()
    check_logits(run(rows_of(case, slice(4))), rows_of(case, slice(4)))
