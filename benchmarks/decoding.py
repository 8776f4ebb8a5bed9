"""What does one decoding step cost between the two streams' logits and the next token?

Ours combines the streams into log π̃ (with a strength) and draws a token in fused kernels: no sort
of the vocabulary. Beside it: the same combination in PyTorch, then transformers' logits processors,
softmax and multinomial, as generate() does. On a CPU ours is the fused combination, transformers'
processors and a draw by lookup in the cumulated probabilities.

    python benchmarks/decoding.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import report
import torch
from harness import HEADS, Case, Timing, add_seconds, in_time, interleave, parser, start
from torch import Tensor

from qadapter.policy.sampling import draw_by_lookup
from qadapter_kernels import dispatch
from qadapter_kernels.reference import Coefficients

COEFFICIENTS = Coefficients(alpha_0=0.3, alpha_tilde=1.0, adapter_coef=1.0, base_coef=-0.3)
STRENGTH = 0.7
TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.7, 50, 0.9, 0.05
SETTINGS = ("temperature", "top-k 50", "top-p 0.9", "min-p 0.05")
SHAPES = {"cpu": ("SmolLM2-135M", (1, 4, 16, 64)), "cuda": ("Llama-3.1-8B", (1, 8, 64))}


def make_logits(
    vocab: int, rows: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Both streams, with a few likely tokens as language models have."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (rows, vocab)
    base = 2 * torch.randn(shape, generator=generator, device=device)
    likely = torch.randint(vocab, (rows, 20), generator=generator, device=device)
    base.scatter_add_(1, likely, torch.full((rows, 20), 10.0, device=device))
    adapter = base + 0.5 * torch.randn(shape, generator=generator, device=device)
    return adapter.to(dtype), base.to(dtype)


def combine_eager(a: Tensor, b: Tensor) -> Tensor:
    """log π̃_w of the two streams, as one writes it in PyTorch."""
    logpi = b.float().log_softmax(-1)
    weight_a = COEFFICIENTS.adapter_coef / COEFFICIENTS.alpha_tilde
    u = weight_a * a.float() + COEFFICIENTS.base_weight / COEFFICIENTS.alpha_tilde * b.float()
    return (STRENGTH * u.log_softmax(-1) + (1 - STRENGTH) * logpi).log_softmax(-1)


def combine_fused(a: Tensor, b: Tensor) -> Tensor:
    strength = torch.full((len(a),), STRENGTH, device=a.device)
    return dispatch.select(a).combine_logits(a, b, COEFFICIENTS, strength)


def filtered_draw(
    setting: str, rows: int, device: str, draw: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """A draw behind transformers' own processors."""
    from transformers import generation

    processors = generation.LogitsProcessorList([generation.TemperatureLogitsWarper(TEMPERATURE)])
    extra = {
        "temperature": lambda: [],
        "top-k 50": lambda: [generation.TopKLogitsWarper(TOP_K)],
        "top-p 0.9": lambda: [generation.TopPLogitsWarper(TOP_P)],
        "min-p 0.05": lambda: [generation.MinPLogitsWarper(MIN_P)],
    }
    processors.extend(extra[setting]())
    ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
    return lambda logprobs: draw(processors(ids, logprobs))


def multinomial(scores: Tensor) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def fused_draw(setting: str) -> Callable[[Tensor], Tensor]:
    from qadapter_kernels.triton import sample

    top_k = TOP_K if setting == "top-k 50" else 0
    top_p = TOP_P if setting == "top-p 0.9" else 1.0
    min_p = MIN_P if setting == "min-p 0.05" else 0.0
    return lambda logprobs: sample(logprobs, TEMPERATURE, top_k, top_p, min_p, 0, 0)


def cases(setting: str, a: Tensor, b: Tensor) -> dict[str, Callable[[], Case]]:
    rows, device = len(a), a.device.type

    def build(combine: Callable, draw_of: Callable[[], Callable]) -> Callable[[], Case]:
        def case() -> Case:
            draw = draw_of()
            return Case(lambda _: draw(combine(a, b)))

        return case

    def theirs() -> Callable[[Tensor], Tensor]:
        return filtered_draw(setting, rows, device, multinomial)

    def ours() -> Callable[[Tensor], Tensor]:
        if device == "cuda":
            return fused_draw(setting)
        return filtered_draw(setting, rows, device, draw_by_lookup)

    return {
        "ours": build(combine_fused, ours),
        "ours, transformers' draw": build(combine_fused, theirs),
        "PyTorch and transformers": build(combine_eager, theirs),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    add_seconds(options)
    options = options.parse_args(arguments)
    recorder = start(options, "decoding")
    head, counts = ("tiny", (1, 2)) if options.dry_run else SHAPES[options.device]
    vocab = HEADS[head].vocab
    for rows in counts:
        if not in_time(options, f"N = {rows}"):
            continue
        a, b = make_logits(vocab, rows, options.dtype, options.device)
        table = []
        for setting in SETTINGS:
            timings = interleave(
                cases(setting, a, b), options.device, budget=options.budget / 4, max_rounds=200
            )
            first = next(iter(timings.values()))
            for name, outcome in timings.items():
                shape = {"head": head, "N": rows, "V": vocab}
                if not isinstance(outcome, Timing):
                    recorder.add(provider=name, mode=setting, shape=shape, status=outcome)
                    print(report.refusal(f"{name}, {setting}", outcome))
                    continue
                ratio = outcome.ms / first.ms if isinstance(first, Timing) else None
                record = recorder.add(
                    provider=name, mode=setting, shape=shape, status="ok", **outcome._asdict(),
                    times_ours=ratio,
                )
                table.append((name, setting, report.number(outcome.ms), report.spread(record),
                              report.number(ratio, "×")))
        report.print_table(
            f"two streams to one token, V = {vocab:,}, N = {rows}",
            ("provider", "draw", "ms", "quartiles", "/ ours"), table,
        )
    if recorder.rows:
        report.draw_decoding(recorder.rows, options.output)


if __name__ == "__main__":
    main()
