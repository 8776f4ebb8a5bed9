"""What does scoring a held-out state cost: ours, eager PyTorch, its matrix products alone?

A state is scored by log π and log π̃ of its action, KL both ways, equal top-1, q and V, in float32
from hidden states on. Eager forms both [rows, V] tensors of logits and walks them with log_softmax
and its kin; ours is one pass over two products (one for a base alone).

    python benchmarks/evaluation.py --heads SmolLM2-135M --rows 1024
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import report
import torch
import torch.nn.functional as F
from harness import (
    HEADS,
    MEBIBYTE,
    Case,
    Recorder,
    Timing,
    add_seconds,
    chosen,
    free,
    in_time,
    interleave,
    parser,
    peak_extra_memory,
    reason,
    start,
)
from torch import Tensor

from qadapter_kernels import Coefficients, linear, linear_state_scores, reference

OBJECTIVE = Coefficients(alpha_0=0.3, alpha_tilde=0.7, adapter_coef=0.7, base_coef=-0.3)
WORKSPACE_MB = 512
SOFTCAP = 30.0
PRODUCTS = "products alone"
ROWS = {
    ("cpu", "SmolLM2-135M"): (128, 1024), ("cpu", "Llama-3.2-1B"): (512,),
    ("cuda", "Llama-3.2-1B"): (4096,), ("cuda", "Llama-3.1-8B"): (4096,),
}
MAX_EXACT_ROWS = 64


class Mode(NamedTuple):
    weights: tuple[float, float]
    """Of a and b in the policy."""
    softcap: float | None = None
    adapted: bool = True


MODES = {
    "as trained": Mode((1.0, 0.0)),
    "another strength": Mode((0.5, 0.5)),  # V of the trained policy is a third log-sum-exp
    "softcap": Mode((1.0, 0.0), SOFTCAP),
    "the base alone": Mode((0.0, 1.0), adapted=False),
}


class Inputs(NamedTuple):
    adapter_hidden: Tensor
    base_hidden: Tensor
    weight: Tensor
    actions: Tensor


Scores = tuple[Tensor, ...]
"""log π, log π̃, KL(π‖π̃), KL(π̃‖π), same top-1, q, V: [N] each."""


def make_inputs(head_name: str, rows: int, device: str) -> Inputs:
    """Logits with a standard deviation of 3; the adapter moves them by 0.3."""
    head, generator = HEADS[head_name], torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    base = normal(rows, head.hidden)
    return Inputs(
        base + 0.1 * normal(rows, head.hidden), base,
        normal(head.vocab, head.hidden).mul_(3 / head.hidden**0.5),
        torch.randint(head.vocab, (rows,), generator=generator, device=device),
    )


def ours(x: Inputs, mode: Mode, backend: str | None = None) -> Scores:
    found = linear_state_scores(
        x.adapter_hidden if mode.adapted else None, x.base_hidden, x.weight, x.actions,
        policy_weights=mode.weights, objective=OBJECTIVE if mode.adapted else None,
        softcap=mode.softcap, workspace_mb=WORKSPACE_MB, backend=backend,
    )
    return *found[:5], *found.soft[:2]


@torch.no_grad()
def eager(x: Inputs, mode: Mode) -> Scores:
    """In chunks whose four tensors of logits fit the same workspace."""
    step = max(1, (WORKSPACE_MB << 20) // (4 * 4 * len(x.weight)))
    chunks = [
        _eager_chunk(x._replace(
            adapter_hidden=x.adapter_hidden[i : i + step], base_hidden=x.base_hidden[i : i + step],
            actions=x.actions[i : i + step],
        ), mode)
        for i in range(0, len(x.actions), step)
    ]
    return tuple(torch.cat(column) for column in zip(*chunks, strict=True))


def _eager_chunk(x: Inputs, mode: Mode) -> Scores:
    column = x.actions[:, None]
    b = _capped(F.linear(x.base_hidden, x.weight), mode.softcap)
    log_base = b.log_softmax(-1)
    base_logprob = log_base.gather(1, column)[:, 0]
    zero = torch.zeros_like(base_logprob)
    if not mode.adapted:
        return base_logprob, base_logprob, zero, zero, zero == 0, zero, zero
    a = _capped(F.linear(x.adapter_hidden, x.weight), mode.softcap)
    w_a, w_b = mode.weights
    log_policy = (w_a * a + w_b * b).log_softmax(-1)
    difference = log_base - log_policy
    q = OBJECTIVE.adapter_coef * a + OBJECTIVE.base_coef * b
    u = (q + OBJECTIVE.alpha_0 * log_base) / OBJECTIVE.alpha_tilde
    return (
        base_logprob, log_policy.gather(1, column)[:, 0], (log_base.exp() * difference).sum(-1),
        -(log_policy.exp() * difference).sum(-1), log_base.argmax(-1) == log_policy.argmax(-1),
        q.gather(1, column)[:, 0], OBJECTIVE.alpha_tilde * u.logsumexp(-1),
    )


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def products(x: Inputs, mode: Mode) -> Callable[[], None]:
    """Our matrix products alone, in our chunks, into memory that is there already."""
    product, streams = linear.Product(x.weight), 1 + mode.adapted
    step = linear.chunk_rows(
        len(x.actions), x.weight.shape[1], streams * product.bytes_per_row, WORKSPACE_MB << 20,
        x.weight.device,
    )
    memory = x.weight.new_zeros((streams, step, len(x.weight)))

    def run() -> None:
        for rows in linear.steps(len(x.actions), step):
            for out_RV in memory:
                hidden = x.base_hidden[rows]
                product.into(hidden, out_RV[: len(hidden)])

    return run


PROVIDERS: dict[str, Callable[[Inputs, Mode], Scores]] = {
    "ours": ours, "ours (torch)": functools.partial(ours, backend="torch"), "eager": eager,
}


def exact(x: Inputs, mode: Mode) -> Scores:
    a, b = (
        _capped(h.double() @ x.weight.double().T, mode.softcap)
        for h in (x.adapter_hidden if mode.adapted else x.base_hidden, x.base_hidden)
    )
    found = reference.score_rows(a, b, x.actions, mode.weights, OBJECTIVE)
    rewards = (found.q_action, found.value) if mode.adapted else (torch.zeros_like(b[:, 0]),) * 2
    return (
        found.base_logprob, found.policy_logprob, found.kl_base_policy, found.kl_policy_base,
        found.same_top1 != 0, *rewards,
    )


def error(provider: str, head_name: str, mode: Mode, device: str) -> float:
    """Largest of any score but top-1, at a few rows."""
    x = make_inputs(head_name, MAX_EXACT_ROWS, device)
    pairs = zip(PROVIDERS[provider](x, mode), exact(x, mode), strict=True)
    return max(float((y - z.double()).abs().max()) for z, y in pairs if y.is_floating_point())


def build(provider: str, mode_name: str, head_name: str, device: str, rows: int) -> Case:
    """One case with inputs of its own. At module level, for a fresh process to find it."""
    x, mode = make_inputs(head_name, rows, device), MODES[mode_name]
    return Case(lambda _: PROVIDERS[provider](x, mode))


def measure_group(
    head_name: str, rows: int, options: argparse.Namespace, recorder: Recorder
) -> list[dict[str, Any]]:
    device, records = options.device, []
    x = make_inputs(head_name, rows, device)
    names = chosen(options.providers, PROVIDERS, "provider")
    for mode_name, mode in MODES.items():
        cases = {
            name: lambda name=name, mode=mode: Case(lambda _: PROVIDERS[name](x, mode))
            for name in names
        }
        cases[PRODUCTS] = lambda run=products(x, mode): Case(lambda _: run())  # noqa: B008
        timings = interleave(cases, device, budget=options.budget)
        for name, outcome in timings.items():
            record: dict[str, Any] = {
                "provider": name, "mode": mode_name,
                "shape": {"head": head_name, "N": rows, **HEADS[head_name]._asdict()},
            }
            if isinstance(outcome, Timing):
                record |= {"status": "ok", **outcome._asdict()}
                for key, other, factor in (("percent_of_products", PRODUCTS, 100),
                                           ("times_ours", "ours", 1)):
                    if isinstance(against := timings.get(other), Timing):
                        record[key] = factor * outcome.ms / against.ms
                if name != PRODUCTS:
                    record["largest_error"] = error(name, head_name, mode, device)
                    if not options.no_memory:
                        record["peak_extra_mib"] = _peak(name, mode_name, head_name, device, rows)
            else:
                record["status"] = outcome
            records.append(recorder.add(**record))
        free(device)
    return records


def _peak(name: str, mode_name: str, head_name: str, device: str, rows: int) -> float | None:
    arguments = name, mode_name, head_name, device
    try:
        return peak_extra_memory(build, arguments, rows, device, False) / MEBIBYTE
    except Exception as failure:
        print(f"{name}: peak memory not measured: {reason(failure)}")
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--heads", nargs="*", help=f"of {', '.join(HEADS)}")
    options.add_argument("--rows", nargs="*", type=int, help="numbers of states N")
    options.add_argument("--providers", nargs="*", metavar="NAME")
    options.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    add_seconds(options)
    options = options.parse_args(arguments)
    if options.dtype == "bfloat16":
        raise SystemExit("error: evaluation's products are float32, whatever the base's are")
    options.dtype = "float32"
    recorder = start(options, "evaluation")
    known = [head for device, head in ROWS if device == options.device]
    if options.dry_run:
        known = ["tiny"]
    for head_name in chosen(options.heads, known, "head"):
        default = (1, 34) if options.dry_run else ROWS[options.device, head_name]
        for rows in options.rows or default:
            if not in_time(options, f"{head_name}, N = {rows}"):
                continue
            report.print_evaluation(
                f"scores of {rows:,} states, {head_name}",
                measure_group(head_name, rows, options, recorder),
            )
    if recorder.rows:
        report.draw_evaluation(recorder.rows, options.output)


if __name__ == "__main__":
    main()
