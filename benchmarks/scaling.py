"""Is the time of the hidden-level loss linear in the number of rows and in the vocabulary?

Times forward and backward of linear_soft_value with bradley_terry over N and over V and fits a line
through each: ms = fixed + slope·size. A slope of log time over log size near 1, a fit near 1 and a
time per row that does not grow say that nothing but the work itself costs.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import hidden_level
import report
from harness import HEADS, Case, Head, Recorder, Timing, interleave, parser, start

ROWS = (256, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = (8_192, 16_384, 32_768, 65_536, 131_072)
FIXED = {
    "cpu": (HEADS["SmolLM2-135M"], 1024),
    "cuda": (HEADS["Llama-3.2-1B"], 8192),
}
"""Head for the sweep over N; rows for the sweep over V, at the same hidden size."""


def _case(head: Head, rows: int, options: Any) -> Callable[[], Case]:
    def build() -> Case:
        x = hidden_level.make_inputs(
            head, rows, options.dtype, options.device, cached=False
        )

        def step(_: Any) -> None:
            x.adapter_hidden.grad = None
            hidden_level.ours(x).backward()

        return Case(step)

    return build


def measure(
    axis: str, sizes: Sequence[int], case_of: Callable[[int], Callable[[], Case]],
    options: Any, recorder: Recorder, fixed: dict[str, int],
) -> dict[str, Any]:
    """One sweep: the fit, and in the records each point."""
    timings = interleave(
        {str(size): case_of(size) for size in sizes}, options.device,
        budget=options.budget, min_rounds=5, max_rounds=40,
    )
    points = {}
    for size in sizes:
        outcome = timings[str(size)]
        ok = isinstance(outcome, Timing)
        recorder.add(
            provider="ours", mode="both", axis=axis, shape={**fixed, axis: size},
            **({"status": "ok", **outcome._asdict()} if ok else {"status": outcome}),
        )
        if ok:
            points[size] = outcome.ms
    if len(points) < 2:
        raise SystemExit(f"error: nothing to fit over {axis}: {timings}")
    return {"axis": axis, "points": points, **fit(points)}


def fit(points: dict[int, float]) -> dict[str, float]:
    """Least squares of log time over log size, and of time over size."""
    exponent, _, _ = _line([math.log(x) for x in points], [math.log(y) for y in points.values()])
    slope, fixed_ms, r_squared = _line(list(points), list(points.values()))
    per_unit = [y / x for x, y in points.items()]
    return {
        "exponent": exponent, "ms_per_1000": 1000 * slope, "fixed_ms": fixed_ms,
        "r_squared": r_squared, "per_unit_spread": max(per_unit) / min(per_unit),
    }


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = covariance / sum((a - mean_x) ** 2 for a in x)
    intercept = mean_y - slope * mean_x
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean_y) ** 2 for b in y)
    return slope, intercept, 1 - left / total if total else 1.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0]).parse_args(arguments)
    recorder = start(options, "scaling")
    rows, vocabularies = ROWS, VOCABULARIES
    head, fixed_rows = FIXED[options.device]
    if options.dry_run:
        rows, vocabularies, head, fixed_rows = (32, 64, 128), (256, 512, 1024), HEADS["tiny"], 32
    sweeps = [
        measure("N", rows, lambda size: _case(head, size, options), options, recorder,
                {"V": head.vocab, "D": head.hidden}),
        measure("V", vocabularies,
                lambda size: _case(Head(size, head.hidden), fixed_rows, options),
                options, recorder, {"N": fixed_rows, "D": head.hidden}),
    ]
    for sweep in sweeps:
        axis = sweep["axis"]
        print_rows = [
            (f"{axis} = {size:,}", report.number(ms), report.number(1000 * ms / size))
            for size, ms in sweep["points"].items()
        ]
        report.print_table(
            f"forward and backward over {axis}: time ~ {axis}^{sweep['exponent']:.3f}, "
            f"line r² = {sweep['r_squared']:.5f}, fixed {sweep['fixed_ms']:.2f} ms, "
            f"per {axis} within {sweep['per_unit_spread']:.2f}×",
            (axis, "ms", f"ms per 1,000 {'rows' if axis == 'N' else 'tokens'}"), print_rows,
        )
    recorder.add(provider="ours", mode="both", axis="fit", status="ok", sweeps=[
        {key: value for key, value in sweep.items() if key != "points"} for sweep in sweeps
    ])
    report.draw_scaling(sweeps, recorder.rows, options.output)


if __name__ == "__main__":
    main()
