"""Is the hidden-level loss faster, smaller and as exact as everybody else's?

Times linear_soft_value and bradley_terry, forward, backward and both, beside eager
PyTorch, torch.compile, Liger, TRL and cut-cross-entropy (see hidden_level.py for what each
computes) and beside the matrix products alone.

    python benchmarks/linear_loss.py
    python benchmarks/linear_loss.py --heads SmolLM2-135M --rows 1024 --modes both
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import hidden_level
import report
import torch
from harness import (
    HEADS,
    MEBIBYTE,
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
    peak_extra_memory,
    reason,
    start,
)
from hidden_level import Inputs, Provider

MODES = ("forward", "backward", "both")
ROWS = {
    ("cpu", "SmolLM2-135M"): (1, 16, 128, 1024, 8192),
    ("cpu", "Llama-3.2-1B"): (1, 16, 128),
    ("cpu", "Llama-3.1-8B"): (1, 16, 128),
    ("cuda", "SmolLM2-135M"): (1, 128, 1024, 8192, 32_768),
    ("cuda", "Llama-3.2-1B"): (1, 128, 1024, 8192, 32_768),
    ("cuda", "Llama-3.1-8B"): (1, 16, 128, 1024, 4096, 16_384, 32_768),
}
MAX_EXACT_ROWS = {"cpu": 1024, "cuda": 4096}
"""Errors do not depend on how many rows there are; float64 products take their time."""
PRODUCTS = "products alone"


def build(
    head_name: str, dtype: torch.dtype, provider_name: str, mode: str, cached: bool, device: str,
    rows: int,
) -> Case:
    """One case with inputs of its own. At module level, for a fresh process to find it."""
    provider = hidden_level.providers(device)[provider_name]
    x = hidden_level.make_inputs(HEADS[head_name], rows, dtype, device, cached)
    return make_case(provider, x, mode)


def make_case(provider: Provider, x: Inputs, mode: str) -> Case:
    def forward() -> torch.Tensor:
        x.adapter_hidden.grad = None
        return provider.loss(x)

    if mode == "forward":
        return Case(lambda _: torch.no_grad()(provider.loss)(x))
    if mode == "backward":  # the forward pass is made anew for each, and not timed
        return Case(lambda loss: loss.backward(), forward)
    return Case(lambda _: forward().backward())


def check(provider: Provider, x: Inputs, head_name: str, device: str) -> None:
    """That it fits, and that it is served by what its row is about."""
    check_fits(provider, head_name, len(x.actions), device)
    provider.check(x)


def check_fits(provider: Provider, head_name: str, rows: int, device: str) -> None:
    needed = provider.logits_bytes * rows * HEADS[head_name].vocab
    if needed > 0.8 * available_bytes(device):
        raise Unavailable(f"needs about {needed / 2**30:.0f} GiB")


def measure_group(
    head_name: str, rows: int, options: argparse.Namespace, recorder: Recorder
) -> list[dict[str, Any]]:
    """All providers and modes at one shape; their records."""
    device = options.device
    forget_compiled()
    everybody = hidden_level.providers(device)
    names = chosen(options.providers, everybody, "provider")
    everybody |= {
        name: one._replace(check=lambda _: check_compiles(options, rows))
        for name, one in everybody.items() if one.compiled
    }
    inputs = {
        cached: hidden_level.make_inputs(HEADS[head_name], rows, options.dtype, device, cached)
        for cached in (False, True)
    }
    variants = [
        (name, cached) for name in names for cached in (False, True)
        if everybody[name].cacheable or not cached
    ]
    mistakes = _errors(variants, everybody, inputs, head_name, rows, device)

    records = []
    for mode in options.modes:
        cases = {
            (name, cached): _guarded(everybody[name], inputs[cached], mode, head_name, device)
            for name, cached in variants
        }
        for cached in (False, True) if mode != "backward" else ():
            run = hidden_level.products(inputs[cached], with_gradient=mode == "both")
            cases[PRODUCTS, cached] = lambda run=run: Case(lambda _: run())
        timings = interleave(cases, device, budget=options.budget)
        for (name, cached), outcome in timings.items():
            floor = timings.get((PRODUCTS, cached))
            ours = timings.get(("ours", cached))
            record = {
                "provider": name, "mode": mode, "base": "cached" if cached else "computed",
                "shape": {"head": head_name, "N": rows, **HEADS[head_name]._asdict()},
            }
            if isinstance(outcome, Timing):
                record |= {"status": "ok", **outcome._asdict()}
                if name == PRODUCTS:
                    record["tflop_per_s"] = product_flops(head_name, rows, mode, cached) / (
                        outcome.ms * 1e9
                    )
                if isinstance(floor, Timing):
                    record["percent_of_products"] = 100 * outcome.ms / floor.ms
                if isinstance(ours, Timing):
                    record["times_ours"] = outcome.ms / ours.ms
                record |= mistakes.get((name, cached), {})
                if mode == "both" and name != PRODUCTS and not options.no_memory:
                    case = head_name, options.dtype, name, mode, cached, device
                    record["peak_extra_mib"] = _peak(everybody[name], case, rows)
            else:
                record |= {"status": outcome}
            records.append(recorder.add(**record))
        free(device)
    return records


def product_flops(head_name: str, rows: int, mode: str, cached: bool) -> float:
    """Of the policy's product, the base's unless it is cached, and the gradient's."""
    head = HEADS[head_name]
    return 2.0 * rows * head.vocab * head.hidden * (1 + (not cached) + (mode == "both"))


def _guarded(
    provider: Provider, x: Inputs, mode: str, head_name: str, device: str
) -> Callable[[], Case]:
    def build_case() -> Case:
        check(provider, x, head_name, device)
        return make_case(provider, x, mode)

    return build_case


def _peak(provider: Provider, arguments: tuple, rows: int) -> float | None:
    """Of ``build(*arguments, rows)``."""
    *_, name, _, _, device = arguments
    try:
        return peak_extra_memory(build, arguments, rows, device, provider.compiled) / MEBIBYTE
    except Exception as error:
        print(f"{name}: peak memory not measured: {reason(error)}")
        return None


def _errors(
    variants: Sequence[tuple[str, bool]], everybody: dict[str, Provider],
    inputs: dict[bool, Inputs], head_name: str, rows: int, device: str,
) -> dict[tuple[str, bool], dict[str, float]]:
    if rows > MAX_EXACT_ROWS[device]:
        return {}
    truth = hidden_level.exact(inputs[False])
    found = {}
    for name, cached in variants:
        try:
            check(everybody[name], inputs[cached], head_name, device)
            found[name, cached] = hidden_level.errors(everybody[name].loss, inputs[cached], truth)
        except Exception:  # whatever it is, the timing says it
            free(device)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--heads", nargs="*", help=f"of {', '.join(HEADS)}")
    options.add_argument("--rows", nargs="*", type=int, help="numbers of rows N")
    options.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    options.add_argument("--providers", nargs="*", metavar="NAME")
    add_compile_rows(options)
    options.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    add_seconds(options)
    options = options.parse_args(arguments)
    recorder = start(options, "linear_loss")
    known = [head for device, head in ROWS if device == options.device]
    if options.dry_run:
        known = ["tiny"]
    for head_name in chosen(options.heads, known, "head"):
        default = (1, 34) if options.dry_run else ROWS[options.device, head_name]
        for rows in options.rows or default:
            if not in_time(options, f"{head_name}, N = {rows}"):
                continue
            report.print_group(
                f"{head_name}, N = {rows}", measure_group(head_name, rows, options, recorder)
            )
    if not recorder.rows:
        return
    latest = report.latest(recorder.output, options.device, recorder.dtype)
    report.draw_linear_loss(latest, options.output)


if __name__ == "__main__":
    main()
