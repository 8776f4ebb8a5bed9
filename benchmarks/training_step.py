"""What does a training step of a whole model cost, lever by lever?

Steps of a LoRA on real pairs' lengths, by everybody with the same loss: eager as the authors wrote
it, eager with the one-product algebra, TRL's DPOTrainer, and ours through the trainer: its fused
loss alone, + the base's part cached, + no padding, + each prompt once, + the upper blocks alone;
and a head adapter. Tokens a second are counted on the padded batch, in which every prompt stands
twice, for all of them alike. Weights are random, in a model's shape.

    python benchmarks/training_step.py --lengths dsp hh_rlhf_harmless --longest 512 1024 --pairs 8
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import report
import torch
from generation import SHAPES
from harness import (
    MEBIBYTE,
    Case,
    Recorder,
    Timing,
    chosen,
    free,
    interleave,
    parser,
    peak_cuda,
    peak_extra_memory,
    reason,
    start,
)
from step_cases import (
    LENGTHS,
    OBJECTIVE,
    WAYS,
    Setting,
    Way,
    draw_pairs,
    tokenized,
    tokenizer_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qadapter.objective import sequence_loss
from qadapter_kernels import linear_soft_value

MODELS = SHAPES | {
    "SmolLM2-135M": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
DEFAULT = {"cpu": "SmolLM2-135M", "cuda": "Llama-3.1-8B"}
AUTHORS, TRL = "eager, authors", "TRL DPOTrainer"


def make_setting(
    model: str, lengths: str, longest: int, pairs: int, pairs_a_step: int, checkpointed: bool,
    device: str, dtype: torch.dtype,
) -> Setting:
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[model], max_position_embeddings=8192, pad_token_id=0,
                         bos_token_id=None, eos_token_id=1)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    vocabulary = config.vocab_size
    return Setting(
        base.eval(), draw_pairs(lengths, pairs, longest, vocabulary), tokenizer_of(vocabulary),
        pairs_a_step, longest, checkpointed,
    )


def counts(setting: Setting) -> dict[str, int]:
    """Of all steps: tokens, those of padded batches, and actions."""
    found = {"tokens": 0, "padded_tokens": 0, "N": 0}
    for part in setting.parts(tokenized(setting)):
        sizes = [
            len(pair["prompt_ids"]) + len(pair[f"{side}_ids"])
            for pair in part for side in ("chosen", "rejected")
        ]
        found["tokens"] += sum(sizes)
        found["padded_tokens"] += len(sizes) * max(sizes)
        found["N"] += sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in part)
    return found


def case_of(way: Way) -> Case:
    def run(_: None) -> None:
        for step in way.steps:
            step()

    return Case(run)


def loss_alone(setting: Setting, actions: int, cached: bool) -> Case:
    """Of all steps at once: from hidden states to their gradient."""
    weight, width = setting.base.get_output_embeddings().weight, setting.base.config.hidden_size
    h_a, h_b = (
        torch.randn(actions, width, device=setting.device, dtype=weight.dtype) for _ in range(2)
    )
    tokens = torch.arange(actions, device=setting.device) % len(weight)
    offsets = torch.tensor([0, actions // 2, actions], device=setting.device)
    known = torch.zeros(actions, device=setting.device)

    def run(hidden: Tensor) -> None:
        base = {"base_action_logit": known, "base_logsumexp": known} if cached else {}
        soft = linear_soft_value(
            hidden, None if cached else h_b, weight, tokens, **OBJECTIVE.coefficients._asdict(),
            **base,
        )
        sequence_loss(soft, offsets, OBJECTIVE).loss.backward()

    return Case(run, lambda: h_a.clone().requires_grad_())


def one_step(provider: str, arguments: tuple, pairs: int) -> Case:
    """The first step of a way, from nothing. At module level, for a fresh process to find it."""
    model, lengths, longest, pairs_a_step, *rest = arguments
    way = WAYS[provider](make_setting(model, lengths, longest, pairs, pairs_a_step, *rest))
    return Case(lambda _: way.steps[0]())


def peak_mib(provider: str, way: Way | None, arguments: tuple, device: str) -> float | None:
    """Beyond weights, optimizer state, batch and what is cached, MiB."""
    try:
        if device == "cuda":
            free(device)
            return peak_cuda(Case(lambda _: way.steps[0]())) / MEBIBYTE
        pairs_a_step = arguments[3]
        return peak_extra_memory(
            one_step, (provider, arguments), pairs_a_step, device, True
        ) / MEBIBYTE
    except Exception as error:
        print(f"{provider}: peak memory not measured: {reason(error)}")
        return None


def measure(
    arguments: tuple, providers: Sequence[str], options: Any, recorder: Recorder
) -> list[dict[str, Any]]:
    """Records of one table; ``arguments``: model, lengths, longest, pairs a step, checkpointed,
    device, dtype."""
    model, lengths, longest, pairs_a_step, checkpointed, device, _ = arguments
    setting = make_setting(model, lengths, longest, options.pairs, *arguments[3:])
    counted = counts(setting)
    ways: dict[str, Way] = {}

    def build(name: str) -> Case:
        ways[name] = WAYS[name](setting)
        return case_of(ways[name])

    cases: dict[Any, Callable[[], Case]] = {n: functools.partial(build, n) for n in providers}
    for cached in (False, True):
        cases["loss", cached] = functools.partial(loss_alone, setting, counted["N"], cached)
    timings = interleave(cases, device, budget=options.budget, max_rounds=options.rounds,
                         min_rounds=min(3, options.rounds))
    weights = sum(p.nbytes for p in setting.base.parameters()) / MEBIBYTE
    shape = {
        "model": model, "lengths": lengths, "T": longest, "pairs": len(setting.pairs),
        "pairs_a_step": pairs_a_step, "gradient_checkpointing": checkpointed, **counted,
    }
    peers = {n: timings[n].ms for n in (AUTHORS, TRL) if isinstance(timings.get(n), Timing)}
    records = []
    for provider in providers:
        outcome = timings[provider]
        record = {"provider": provider, "mode": "step", "shape": shape}
        if isinstance(outcome, Timing):
            record |= {
                "status": "ok", **outcome._asdict(), "weights_mib": weights,
                "tokens_per_s": counted["padded_tokens"] / outcome.ms * 1e3,
                "read_once_s": ways[provider].read_once,
            }
            for key, peer in (("speedup_over_authors", AUTHORS), ("speedup_over_trl", TRL)):
                if peer in peers:
                    record[key] = peers[peer] / outcome.ms
            loss = timings["loss", "every step" not in provider]
            if provider.startswith("ours") and isinstance(loss, Timing):
                record["loss_percent"] = 100 * loss.ms / outcome.ms
            if not options.no_memory:
                record["peak_extra_mib"] = peak_mib(provider, ways[provider], arguments, device)
        else:
            record["status"] = outcome
        records.append(recorder.add(**record))
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", choices=MODELS)
    options.add_argument("--lengths", nargs="*", choices=sorted(p.stem for p in LENGTHS.iterdir()),
                         default=["dsp"], help="of which pairs")
    options.add_argument("--longest", nargs="*", type=int, default=[1024], metavar="TOKENS",
                         help="where they are cut")
    options.add_argument("--pairs", type=int, default=4, help="in all")
    options.add_argument("--pairs_a_step", type=int, default=4)
    options.add_argument("--checkpointing", nargs="*", choices=("off", "on"), default=["off"],
                         help="of activations, in every LoRA case")
    options.add_argument("--rounds", type=int, default=8, help="at most so many of each")
    options.add_argument("--providers", nargs="*", metavar="NAME")
    options.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    options = options.parse_args(arguments)
    recorder = start(options, "training_step")
    model = options.model or DEFAULT[options.device]
    if options.dry_run:
        model, options.longest, options.pairs, options.pairs_a_step = "tiny", [96], 4, 2
        options.checkpointing = ["off", "on"]
    providers = chosen(options.providers, WAYS, "provider")
    for lengths in options.lengths:
        for longest in options.longest:
            for checkpointing in options.checkpointing:
                records = measure(
                    (model, lengths, longest, options.pairs_a_step, checkpointing == "on",
                     options.device, options.dtype),
                    providers, options, recorder,
                )
                report.print_training_step(records)
                free(options.device)
    latest = report.latest(recorder.output, options.device, recorder.dtype)
    report.draw_training_step(latest, options.output)


if __name__ == "__main__":
    main()
