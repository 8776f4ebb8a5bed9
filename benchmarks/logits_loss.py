"""How close is soft_value on given logits to the bandwidth of a copy?

Times forward and backward at the general coefficients, where both streams are read
both ways: 4V bytes a row forward, 6V backward. Beside eager PyTorch and torch.compile, and with
every backend that is there. The yardstick is a copy of one [N, V] tensor measured in the same run,
counting bytes read and bytes written.

    python benchmarks/logits_loss.py
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import report
import torch
from harness import (
    HEADS,
    Case,
    Recorder,
    Timing,
    Unavailable,
    add_compile_rows,
    add_seconds,
    available_bytes,
    check_compiles,
    chosen,
    forget_compiled,
    free,
    in_time,
    interleave,
    parser,
    start,
)
from torch import Tensor

from qadapter_kernels import dispatch, reference, soft_value
from qadapter_kernels.reference import Coefficients

COEFFICIENTS = Coefficients(alpha_0=0.3, alpha_tilde=0.7, adapter_coef=1.0, base_coef=0.0)
SHAPES = {
    "cpu": (("SmolLM2-135M", (1, 16, 128, 1024)), ("Llama-3.1-8B", (1, 16, 128))),
    "cuda": (("SmolLM2-135M", (1, 128, 4096, 32_768)),
             ("Llama-3.1-8B", (1, 16, 128, 1024, 4096, 16_384))),
}
BYTES_PER_LOGIT = {"forward": 4, "backward": 6}
MAX_EXACT_ROWS = 256
COPY, COMPILED = "copy", "torch.compile"


class Logits(NamedTuple):
    adapter: Tensor
    base: Tensor
    actions: Tensor
    grad_q: Tensor
    grad_v: Tensor


def make_logits(vocab: int, rows: int, dtype: torch.dtype, device: str) -> Logits:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return Logits(
        (3 * normal(rows, vocab)).to(dtype).requires_grad_(), (3 * normal(rows, vocab)).to(dtype),
        torch.randint(vocab, (rows,), generator=generator, device=device),
        normal(rows), normal(rows),
    )


Outputs = tuple[Tensor, Tensor]
"""q_action and value [N]."""


def ours(x: Logits, backend: str | None = None) -> Outputs:
    soft = soft_value(x.adapter, x.base, x.actions, **COEFFICIENTS._asdict(), backend=backend)
    return soft.q_action, soft.value


def eager(x: Logits) -> Outputs:
    q_NV = x.adapter.float()
    base_logprobs_NV = x.base.float().log_softmax(-1)
    u_NV = (q_NV + COEFFICIENTS.alpha_0 * base_logprobs_NV) / COEFFICIENTS.alpha_tilde
    return (
        q_NV.gather(1, x.actions[:, None])[:, 0], COEFFICIENTS.alpha_tilde * u_NV.logsumexp(-1)
    )


def providers(device: str) -> dict[str, Callable[[Logits], Outputs]]:
    names = [n for n in dispatch.PREFERENCE[device]
             if dispatch.load(n).unavailable_reason(device) is None]
    return {
        "ours": ours,
        **{f"ours ({n})": functools.partial(ours, backend=n)
           for n in names if n != dispatch.default(device).NAME},
        "eager": eager,
        COMPILED: torch.compile(eager, dynamic=False, fullgraph=True),
    }


def backward(outputs: Outputs, x: Logits) -> None:
    torch.autograd.backward(outputs, (x.grad_q, x.grad_v))


def make_case(function: Callable[[Logits], Outputs], x: Logits, mode: str) -> Case:
    def forward() -> Outputs:
        x.adapter.grad = None
        return function(x)

    if mode == "forward":
        return Case(lambda _: torch.no_grad()(function)(x))
    return Case(lambda outputs: backward(outputs, x), forward)


def exact(x: Logits) -> tuple[Tensor, Tensor]:
    a = x.adapter.detach().double().requires_grad_()
    out = reference.soft_value(a, x.base.double(), x.actions, COEFFICIENTS)
    torch.autograd.backward((out.q_action, out.value), (x.grad_q.double(), x.grad_v.double()))
    return out.value.detach(), a.grad


def errors(function: Callable[[Logits], Outputs], x: Logits, truth: Outputs) -> dict[str, float]:
    """Largest error of a value, and the gradient's relative error."""
    x.adapter.grad = None
    outputs = function(x)
    backward(outputs, x)
    gradient, x.adapter.grad = x.adapter.grad.double(), None
    return {
        "loss_error": float((outputs[1].detach().double() - truth[0]).abs().max()),
        "gradient_error": float((gradient - truth[1]).norm() / truth[1].norm()),
    }


def measure_group(
    head: str, rows: int, options: argparse.Namespace, recorder: Recorder
) -> list[dict[str, Any]]:
    forget_compiled()
    device = options.device
    everybody = providers(device)
    functions = {name: everybody[name] for name in chosen(options.providers, everybody, "provider")}
    vocab = HEADS[head].vocab
    x = make_logits(vocab, rows, options.dtype, device)
    source, target = x.base, torch.zeros_like(x.base)
    truth = exact(x) if rows <= MAX_EXACT_ROWS else None
    records = []
    for mode, bytes_per_logit in BYTES_PER_LOGIT.items():
        def guarded(function: Callable[[Logits], Outputs], mode: str = mode) -> Case:
            if function is not ours and 24 * rows * vocab > 0.8 * available_bytes(device):
                raise Unavailable(f"needs about {24 * rows * vocab / 2**30:.0f} GiB")
            if function is functions.get(COMPILED):
                check_compiles(options, rows)
            return make_case(function, x, mode)

        cases = {name: functools.partial(guarded, f) for name, f in functions.items()}
        cases[COPY] = lambda: Case(lambda _: target.copy_(source))
        timings = interleave(cases, device, budget=options.budget)
        copy_rate = 4 * rows * vocab / timings[COPY].ms
        for name, outcome in timings.items():
            record: dict[str, Any] = {
                "provider": name, "mode": mode, "shape": {"head": head, "N": rows, "V": vocab},
            }
            if isinstance(outcome, Timing):
                moved = (4 if name == COPY else bytes_per_logit) * rows * vocab
                record |= {
                    "status": "ok", **outcome._asdict(), "gb_per_s": moved / outcome.ms / 1e6,
                    "percent_of_copy": 100 * moved / outcome.ms / copy_rate,
                }
                if isinstance(mine := timings.get("ours"), Timing):
                    record["times_ours"] = outcome.ms / mine.ms
                if truth is not None and name in functions:
                    record |= errors(functions[name], x, truth)
            else:
                record["status"] = outcome
            records.append(recorder.add(**record))
        free(device)
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--providers", nargs="*", metavar="NAME")
    options.add_argument("--heads", nargs="*", help=f"of {', '.join(HEADS)}")
    options.add_argument("--rows", nargs="*", type=int, help="numbers of rows N")
    add_compile_rows(options)
    add_seconds(options)
    options = options.parse_args(arguments)
    recorder = start(options, "logits_loss")
    shapes = {"tiny": (1, 40)} if options.dry_run else dict(SHAPES[options.device])
    for head in chosen(options.heads, shapes, "head"):
        for rows in options.rows or shapes[head]:
            if not in_time(options, f"{head}, N = {rows}"):
                continue
            records = measure_group(head, rows, options, recorder)
            report.print_group(f"soft_value, V = {HEADS[head].vocab:,}, N = {rows:,}", records)
    if recorder.rows:
        report.draw_logits_loss(recorder.rows, options.output)


if __name__ == "__main__":
    main()
