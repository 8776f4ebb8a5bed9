"""Which backend serves each operator on this machine: what is said, and what is seen launching.

Calls every operator once, small, on the device, and writes down whose kernels ran. Ends with exit
code 1 where a fallback served, or another backend than ``qadapter_kernels.serving`` says.

    python benchmarks/served_by.py
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import report
import torch
from harness import need_device, parser

from qadapter_kernels import (
    bradley_terry,
    dispatch,
    linear_logsumexp,
    linear_soft_value,
    linear_state_scores,
    native,
    soft_value,
)
from qadapter_kernels.reference import Coefficients

COEFFICIENTS = Coefficients(alpha_0=0.3, alpha_tilde=0.7, adapter_coef=1.0, base_coef=0.0)
ROWS, VOCABULARY, HIDDEN = 6, 1040, 64


@contextlib.contextmanager
def watched(device: str) -> Iterator[set[str]]:
    """Names of the backends whose kernels are launched inside. PyTorch's own leave no name."""
    seen: set[str] = set()
    library = native.library

    def named_library(name: str):
        seen.add(name)
        return library(name)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(native, "library", named_library))
        if dispatch.load("triton").unavailable_reason(device) is None:
            from qadapter_kernels.triton import launch

            def named_launch(*args, **kwargs):
                seen.add("triton")
                return original(*args, **kwargs)

            original = launch.launch
            stack.enter_context(mock.patch.object(launch, "launch", named_launch))
        yield seen


def calls(device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """By operator: one call of it, backward included."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    a, b = normal(ROWS, VOCABULARY).requires_grad_(), normal(ROWS, VOCABULARY)
    h, hb = normal(ROWS, HIDDEN).requires_grad_(), normal(ROWS, HIDDEN)
    weight = normal(VOCABULARY, HIDDEN)
    actions = torch.randint(VOCABULARY, (ROWS,), generator=generator).to(device)
    q, value = (normal(ROWS).float().requires_grad_() for _ in range(2))
    offsets = torch.tensor([0, 4, ROWS], device=device)

    def backward(soft) -> None:
        (soft.q_action - soft.value).sum().backward()

    return {
        "soft_value": lambda: backward(soft_value(a, b, actions, **COEFFICIENTS._asdict())),
        "linear_soft_value":
            lambda: backward(linear_soft_value(h, hb, weight, actions, **COEFFICIENTS._asdict())),
        "linear_logsumexp": lambda: linear_logsumexp(hb, weight, actions),
        "linear_state_scores":
            lambda: linear_state_scores(h.detach(), hb, weight.float(), actions),
        "bradley_terry": lambda: bradley_terry(q, value, offsets).loss.backward(),
        "combine_logits":
            lambda: dispatch.select(b).combine_logits(a.detach(), b, COEFFICIENTS, None),
        "sample": lambda: _sample(b),
    }


def _sample(logits: torch.Tensor) -> None:
    from qadapter.policy import sampling

    draw = sampling.draw_by_lookup
    if logits.is_cuda and dispatch.load("triton").unavailable_reason("cuda") is None:
        kernel = dispatch.load("triton").sample
        draw = lambda x: kernel(x, 0.7, 50, 0.9, 0.05, 0, 0)  # noqa: E731
    draw(logits)


def observe(device: str, dtype: torch.dtype) -> list[tuple[dispatch.Serving, str, str | None]]:
    """Each operator's row of ``serving``, what was seen, and what is wrong with it (None: nothing).
    """
    rows = []
    everything = calls(device, dtype)
    for said in dispatch.serving(device):
        problem = f"a fallback serves: {said.reason}" if said.is_fallback else None
        with watched(device) as seen:
            try:
                everything[said.operator]()
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        names = ", ".join(sorted(seen)) or "torch"
        if problem is None and names != (said.backend or "torch"):
            problem = f"said to be served by {said.backend}, seen served by {names}"
        rows.append((said, names, problem))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0]).parse_args(arguments)
    need_device(options.device)
    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    rows = observe(options.device, dtype)
    report.print_table(
        f"who serves what on {options.device}", ("operator", "said", "seen", "why"),
        [(said.operator, said.backend or "PyTorch", seen, said.reason) for said, seen, _ in rows],
    )
    wrong = [f"{said.operator}: {problem}" for said, _, problem in rows if problem]
    print(*(f"WRONG: {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
