"""The model card of an export: what it is, how to serve it, and what its check found."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from qadapter.exporting.approximation import Approximation
from qadapter.exporting.gguf import telling
from qadapter.exporting.gguf.check import GgufCheck
from qadapter.exporting.verification import Check
from qadapter.system.markup import markdown_code, markdown_table, markdown_text, one_line

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel

_SERVING = {
    "merged": (
        "A plain checkpoint of the base's own architecture: whatever serves the base serves it.",
        "vllm serve {folder}\ntransformers serve {folder}",
    ),
    "gguf": (
        "A checkpoint of the base's own architecture, as one GGUF file.",
        "llama-server --model={folder}/{folder}.gguf --temp {temperature:.6g} --top-k 0 --top-p 1 "
        "--min-p 0",
    ),
    "lm_head_lora": (
        "A LoRA on the base's output layer, in PEFT's own format.",
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules custom={folder}",
    ),
    "peft": (
        "A LoRA on the base, in PEFT's own format.",
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules custom={folder}",
    ),
}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


def write_card(
    folder: Path, name: str, model: QAdapterModel, form: str, base: str | None, rank: int,
    temperature: float, tokenizer: bool, check: Check, approximation: Approximation | None,
    gguf: GgufCheck | None = None,
) -> None:
    """Write ``README.md``.

    Args:
        name: what the folder will be called. base: the base's name or folder, for the commands.
        temperature: to sample at for the policy itself.
        tokenizer: whether the export holds one.
    """
    data = ModelCardData(
        base_model=base if base and base.count("/") == 1 and not Path(base).exists() else None,
        library_name={"merged": "transformers", "gguf": "gguf"}.get(form, "peft"),
        pipeline_tag="text-generation", tags=["qadapter", "q-adapter", "preference-optimization"],
    )
    what, command = _SERVING[form]
    max_rank = next((r for r in _VLLM_RANKS if r >= rank), rank)
    p_a, p_b = model.policy.stream_weights()
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {markdown_text(name)}",
        f"{markdown_code(model.base_identity.name)} customised by a "
        "[Q-Adapter](https://arxiv.org/abs/2407.03856) (a residual Q-function learned from "
        f"preference pairs). {what}",
        "```sh\n"
        + command.format(
            folder=shlex.quote(one_line(name)),
            base=shlex.quote(one_line(base or model.base_identity.name)), rank=max_rank,
            temperature=temperature,
        )
        + "\n```",
        "## Sampling",
        _sampling(form, temperature),
        "## Policy",
        _table({
            "form": form, "strength": f"{model.policy.strength:g}",
            "weight of the adapted and of the base stream": f"{p_a:.6g}, {p_b:.6g}",
            **{key: str(value) for key, value in vars(model.objective).items()},
        }),
        *_approximation(approximation),
        *_gguf(gguf),
        "## Check" if gguf is None else "## Check of the checkpoint it was made from",
        _check(check, form, approximation is not None),
        "## Versions",
        _table({
            **{n: importlib.metadata.version(n) for n in ("qadapter", "torch", "transformers")},
            **{f"{n} (in the check)": version for n, version in check.versions.items()},
        }),
    ]
    if form == "merged" and not tokenizer:
        sections.insert(4, "The base came without a tokenizer, and so does this folder.")
    text = "\n\n".join(sections) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def _sampling(form: str, temperature: float) -> str:
    if form in ("merged", "gguf"):
        return (
            "The output layer holds the policy's own logits: temperatures mean what they mean for "
            f"the base. `generation_config.json` is the base's (temperature {temperature:g})."
        )
    if temperature == 1.0:
        return "The logits are the policy's own: temperature 1 samples it."
    return (
        f"The logits are the policy's times {temperature:.6g}: **sample at temperature "
        f"{temperature:.6g}**, which `generation_config.json` says too, and multiply any other "
        "temperature by that number. Greedy decoding and beams' order do not depend on it."
    )


def _approximation(found: Approximation | None) -> Sequence[str]:
    if found is None:
        return ()
    return (
        "## Approximation",
        "The trained adapter is not linear. This export holds the linear adapter nearest to it, "
        f"fitted to {found.fitted_states:,} states of given texts and measured on "
        f"{found.held_out_states:,} others:",
        _table({
            "rank": "full" if found.rank is None else str(found.rank),
            "KL(trained policy ‖ this export)": f"{found.kl_policy_export:.3g} nats a token",
            "KL(trained policy ‖ base)": f"{found.kl_policy_base:.3g} nats a token",
            "same most likely token": f"{found.top1_agreement:.4f}",
        }),
    )


def _gguf(check: GgufCheck | None) -> Sequence[str]:
    if check is None:
        return ()
    return "## Check", telling.how_checked(check), _table(telling.rows(check))


def _check(check: Check, form: str, approximated: bool) -> str:
    library = "transformers" if form in ("merged", "gguf") else "transformers and PEFT"
    policy = "the approximation's policy" if approximated else "the policy"
    return (
        f"Reloaded by stock {library} in a process without qadapter, in {check.dtype}, and decoded "
        f"greedily on {check.prompts} fixed prompts; compared with {policy} in higher precision "
        "at the same states:\n\n"
    ) + _table({
        "tokens that are the policy's most likely": f"{check.top_tokens} of {check.tokens}"
        + (" (the others tie within rounding)" if check.top_tokens < check.tokens else ""),
        "answers equal to QAdapterModel.generate's": f"{check.same_answers} of {check.prompts}",
        "largest difference of a logit": f"{check.max_logit_error:.3g}",
        "the same, over what rounding may explain": f"{check.error_to_tolerance:.3g} (below 1)",
        "KL(policy ‖ export)": f"{check.kl_per_token:.3g} nats a token",
    })


def _table(entries: dict[str, str]) -> str:
    return markdown_table(("", ""), entries.items())
