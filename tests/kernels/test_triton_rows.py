"""The hidden level in Triton: the row kernel by itself, and ``linear_soft_value`` through it."""

from __future__ import annotations

import interpreter  # first: it decides how triton is imported
import pytest
import rows
import test_linear
import torch
from cases import COEFFICIENTS, check_linear, linear_case, linear_ours, same_bits

from qadapter_kernels import triton as backend_module

pytestmark = [interpreter.quiet, interpreter.interpreter_only]  # see test_triton_gpu for the GPU
INF = torch.inf
STORES = [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
]
"""(dtype of z, dtype of P′)."""


@pytest.fixture(autouse=True)
def _prepare(monkeypatch):
    interpreter.prepare(monkeypatch)


@pytest.fixture
def backend():
    return "triton"


def check(case: rows.RowCase, residual_dtype: torch.dtype | None, statistics: bool) -> None:
    exact, eager = rows.definition(case), rows.definition(case, torch.float32)
    result = rows.run(backend_module, case, residual_dtype, statistics)
    if not statistics:
        exact, eager = (x._replace(statistics=torch.empty(0)) for x in (exact, eager))
    if residual_dtype is None:
        exact, eager = (x._replace(residual=x.residual[:, :0]) for x in (exact, eager))
    rows.check(result, exact, eager)


@pytest.mark.parametrize("base", ["alone", "base", "statistics"])
@pytest.mark.parametrize("stores", STORES, ids=str)
def test_equals_the_definition(stores, base):
    """Several tiles, the last one ragged; masked rows hold NaN, and so does memory around rows."""
    z_dtype, residual_dtype = stores
    case = rows.row_case(
        5, 1031, z_dtype, base=base != "alone", bias=base == "base", exact=z_dtype.itemsize == 2,
        stride=1050, offset=3,
    )
    check(case, residual_dtype, base == "statistics")
    assert rows.guards_hold(case.z)


def test_narrowing_stays_inside_its_row():
    """The second half of a row's bytes and the gap between rows stay as they were."""
    case = rows.row_case(4, 1031, torch.float32, stride=1040, base=False)
    before = case.z.clone()
    rows.run(backend_module, case, torch.bfloat16, False)
    assert rows.guards_hold(case.z)  # NaN between the rows
    assert same_bits([case.z[:, 516:]], [before[:, 516:]])


@pytest.mark.parametrize("vocab", [1, 2, 7, 511, 512, 513, 1024, 1537])
def test_odd_vocabularies_and_tile_edges(vocab):
    check(rows.row_case(4, vocab, torch.float32), torch.bfloat16, True)


@pytest.mark.parametrize("base", [False, True])
def test_forward_only_leaves_z_alone(base):
    case = rows.row_case(4, 700, torch.bfloat16, base=base)
    before = case.z.clone()
    check(case, None, False)
    assert same_bits([case.z], [before])


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_rows_of_minus_infinity(residual_dtype):
    """No support: lse = −inf, and P′ is 0 at the action too."""
    case = rows.row_case(5, 600, torch.float32, bias=True)
    case.z[0], case.zb[4] = -INF, -INF
    case.z[3, :520] = -INF  # the first tile of a row
    case.offset_bias[17] = -INF
    case.actions[3] = 560
    exact = rows.definition(case)
    result = rows.run(backend_module, case, residual_dtype, True)
    assert result.policy_lse[0] == -INF and result.base_lse[4] == -INF
    assert not result.residual[0].any() and not result.residual.isnan().any()
    rows.check(result._replace(statistics=exact.statistics), exact, exact)


def test_no_rows():
    empty = torch.empty(0, 40)
    out = backend_module.rows_forward(
        empty, empty, torch.empty(0, dtype=torch.int64), 1.0, None, 1.0, None, True,
        torch.bfloat16, True,
    )
    assert [tuple(x.shape) for x in out] == [(0,), (0,), (3, 0)]


def test_offsets_beyond_2_31_elements():
    """Three rows 2³⁰ + 16 elements apart, P′ written into all: row and stride fit 32 bits, their
    product does not. Nothing between the rows is touched."""
    stride = 2**30 + 16
    far = torch.empty(2 * stride + 64, dtype=torch.bfloat16).as_strided((3, 64), (stride, 1))
    near = torch.randn(3, 64).bfloat16()
    far.copy_(near)
    actions = torch.tensor([3, -1, 63])
    for z in (far, near):
        backend_module.rows_forward(
            z, None, actions, 1.0, None, 1.0, None, True, torch.bfloat16, False
        )
    assert same_bits([far], [near])


def test_what_cannot_be_stored_is_refused():
    z, actions = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    rest = (actions, 1.0, None, 1.0, None)
    with pytest.raises(ValueError, match=r"torch\.float16 residual can't stand in .*bfloat16"):
        backend_module.rows_forward(z, None, *rest, True, torch.float16, False)
    with pytest.raises(ValueError, match="zb is missing"):
        backend_module.rows_forward(z, None, *rest, False, z.dtype, True)


# --- linear_soft_value -------------------------------------------------------------------------

test_linear_logsumexp = test_linear.test_linear_logsumexp_is_what_linear_soft_value_computes
test_linear_masked_rows = test_linear.test_masked_rows
test_linear_no_rows = test_linear.test_no_rows
test_linear_no_grad = test_linear.test_no_grad_computes_no_gradient_product
test_linear_out_of_order_backward = test_linear.test_repeated_and_out_of_order_backward
test_linear_peaked_rows = test_linear.test_peaked_rows_in_16_bits
test_linear_without_support = test_linear.test_rows_without_support_give_no_nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_linear_equals_the_definition(name, dtype):
    case = linear_case(
        rows=5, vocab=600, dtype=dtype, coef=COEFFICIENTS[name], bias=True, logit_scale=0.5
    )
    check_linear(linear_ours(case, "triton"), case)


def test_linear_deterministic_to_the_bit():
    case = linear_case(rows=4, vocab=600, dtype=torch.bfloat16)
    first = linear_ours(case, "triton")
    assert same_bits(linear_ours(case, "triton"), first)
