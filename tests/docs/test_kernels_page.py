"""docs/kernels.md counts the products of the hidden level right, and what is held beside them."""

from __future__ import annotations

import re

import pytest
import torch
from pages import read
from torch.utils.flop_counter import FlopCounterMode

from qadapter_kernels import torch_backend
from qadapter_kernels.linear import Head, forward
from qadapter_kernels.reference import Coefficients

N, V, D = 24, 160, 16


def products(need_grad: bool, cached: bool, statistics: bool = False) -> float:
    """How many products of N·V·D ``linear_soft_value`` takes."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    lse = (hidden @ weight.T).logsumexp(-1) if cached else None
    with FlopCounterMode(display=False) as counter:
        outputs = forward(
            hidden, hidden, Head(weight, None, 1.0), torch.randint(V, (N,)), lse,
            Coefficients(1.0, 1.0, 1.0, -1.0), 1 << 20, statistics, need_grad, torch_backend,
        )
    assert all(out.numel() <= 3 * N or out.shape == (N, D) for out in outputs)  # no [N, V] is kept
    return counter.get_total_flops() / (2 * N * V * D)


@pytest.mark.parametrize(("need_grad", "cached", "count"), [
    (True, False, 3), (True, True, 2), (False, False, 2), (False, True, 1),
])
def test_the_products_of_the_hidden_level(need_grad, cached, count):
    assert products(need_grad, cached) == pytest.approx(count)


def test_the_pages_example():
    text = " ".join(read("docs/kernels.md").split())
    states, hidden, vocabulary, product, logits = re.search(
        r"For ([\d,]+) states of \S+ \(D ([\d,]+), V ([\d,]+)\) a product is ([\d.]+) TFLOP; two "
        r"float32 tensors of logits, .* would take ([\d.]+) GiB", text
    ).groups()
    n, d, v = (int(x.replace(",", "")) for x in (states, hidden, vocabulary))
    assert f"{2 * n * d * v / 1e12:.2f}" == product
    assert f"{2 * n * v * 4 / 2**30:.1f}" == logits
