"""The sequence loss in Triton: the tests of every backend, and its last-arriver sum."""

from __future__ import annotations

import interpreter  # first: it decides how triton is imported
import pytest
import test_bradley_terry
import torch
from cases import FLOAT32_EPS, error
from interpreter import on_device

from qadapter_kernels import torch_backend
from qadapter_kernels import triton as backend_module
from qadapter_kernels.triton import launch

pytestmark = interpreter.quiet


@pytest.fixture(autouse=True)
def _prepare(monkeypatch):
    interpreter.prepare(monkeypatch)


@pytest.fixture
def backend():
    if not interpreter.INTERPRETED:
        pytest.skip("CPU tensors need Triton's interpreter")
    return "triton"


test_equals_the_definition = test_bradley_terry.test_equals_the_definition
test_gradients_equal_float64 = test_bradley_terry.test_gradients_equal_float64
test_no_actions = test_bradley_terry.test_no_actions
test_no_pairs = test_bradley_terry.test_no_pairs
test_value_is_not_read_without_discount = test_bradley_terry.test_value_is_not_read_without_discount
test_large_margins = test_bradley_terry.test_large_margins_neither_overflow_nor_vanish
test_parts_of_a_batch_add_up = test_bradley_terry.test_parts_of_a_batch_add_up
test_inputs_of_other_layouts = test_bradley_terry.test_inputs_of_other_layouts
test_deterministic_to_the_bit = test_bradley_terry.test_deterministic_to_the_bit
test_16_bit_inputs = test_bradley_terry.test_16_bit_inputs_are_summed_in_float32
test_no_grad_and_repeated_backward = test_bradley_terry.test_no_grad_and_repeated_backward


@pytest.mark.parametrize("bootstrap_next", [True, False])
def test_sequences_of_several_tiles(bootstrap_next):
    """Lengths around the tile's, an empty sequence, a first row that starts in mid-tile."""
    lengths = torch.tensor([511, 0, 513, 1, 1300, 512])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows, sequences = int(offsets[-1]), len(lengths)
    q, v, grad_tokens = torch.randn(3, rows)
    divisors, grad_sequence = 1 + torch.rand(sequences), torch.randn(sequences)
    options = (0.9, 0.3, bootstrap_next, 1 / 3, 1 / rows)

    q_, v_, offsets_, divisors_ = on_device(q, v, offsets, divisors)
    out = backend_module.bradley_terry_forward(q_, v_, offsets_, divisors_, *options)
    exact = torch_backend.bradley_terry_forward(
        q.double(), v.double(), offsets, divisors.double(), *options
    )
    for x, y in zip(out, exact, strict=True):
        assert error(x.cpu(), y).max() < 64 * FLOAT32_EPS * (1 + y.abs().max())

    grads = (torch.tensor([0.7, -0.2, 0.5]), grad_sequence, grad_tokens)
    back = backend_module.bradley_terry_backward(
        out[2], out[1], offsets_, divisors_, *options, *on_device(*grads)
    )
    exact = torch_backend.bradley_terry_backward(
        exact[2], exact[1], offsets, divisors.double(), *options, *(g.double() for g in grads)
    )
    for x, y in zip(back, exact, strict=True):
        assert error(x.cpu(), y).max() < 64 * FLOAT32_EPS * (1 + y.abs().max())


def test_many_pairs_are_all_in_the_sum(monkeypatch):
    """More pairs than a tile: the last arriver walks their partial sums in several steps."""
    monkeypatch.setitem(launch.TILES, "bradley_terry", launch.Tile(32, 1))
    pairs = 70 if interpreter.INTERPRETED else 5000
    offsets = torch.arange(2 * pairs + 1)
    q, divisors = torch.randn(2 * pairs), torch.ones(2 * pairs)
    args = (*on_device(q, torch.zeros_like(q), offsets, divisors), 1.0, 0.5, True)
    losses = backend_module.bradley_terry_forward(*args, 1 / pairs, 0.5 / pairs)[0].cpu()
    q = q.double()
    preference = torch.nn.functional.softplus(q[pairs:] - q[:pairs]).mean()
    chi2 = q.square().mean()
    expected = torch.stack([preference + 0.5 * chi2, preference, chi2])
    assert error(losses, expected).max() < 16 * FLOAT32_EPS
