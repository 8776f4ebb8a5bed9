"""The model card of an export: what it is, how to serve it, and what its check found."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from qadapter.exporting.approximation import Approximation
from qadapter.exporting.engines import Served, ways
from qadapter.exporting.gguf import telling
from qadapter.exporting.gguf.check import GgufCheck
from qadapter.exporting.verification import Check
from qadapter.policy import card as policy_card
from qadapter.system.markup import (
    markdown_code,
    markdown_list,
    markdown_table,
    markdown_text,
    one_line,
)

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel

_FORMS = {
    "merged": "A plain checkpoint of the base's own architecture.",
    "gguf": "A checkpoint of the base's own architecture, as one GGUF file.",
    "ollama": "A checkpoint of the base's own architecture, as one GGUF file, and Ollama's "
    "Modelfile of it.",
    "lm_head_lora": "A LoRA on the base's output layer, in PEFT's own format.",
    "peft": "A LoRA on the base, in PEFT's own format.",
}


def write_card(
    folder: Path, model: QAdapterModel, served: Served, check: Check, *, tokenizer: bool = False,
    approximation: Approximation | None = None, transformers_4: bool = True,
    gguf: GgufCheck | None = None, modelfile: Sequence[str] = (),
) -> None:
    """Write ``README.md``.

    Args:
        folder: where it is written; ``served.folder`` is what it will be called.
        tokenizer: whether the export holds one.
        transformers_4: whether that reads the same configuration.
        modelfile: what there is to know of a Modelfile.
    """
    form = served.form
    hub = served.base if not served.base_is_folder and served.base.count("/") == 1 else None
    data = ModelCardData(
        base_model=hub,
        library_name={"merged": "transformers", "gguf": "gguf", "ollama": "gguf"}.get(form, "peft"),
        pipeline_tag="text-generation", tags=list(policy_card.TAGS),
    )
    p_a, p_b = model.policy.stream_weights()
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {markdown_text(served.folder)}",
        f"{markdown_code(_said_by_its_user(model, served))} customised by a "
        "[Q-Adapter](https://arxiv.org/abs/2407.03856) (a residual Q-function learned from "
        f"preference pairs). {_FORMS[form]}",
        *_missing(form, tokenizer, transformers_4),
        "## Serving",
        *_serving(served),
        "## Sampling",
        _sampling(form, served.temperature, gguf is not None),
        "## Policy",
        _table({
            "form": form, "strength": f"{model.policy.strength:g}",
            "weight of the adapted and of the base stream": f"{p_a:.6g}, {p_b:.6g}",
            **{key: str(value) for key, value in vars(model.objective).items()},
        }),
        *_approximation(approximation),
        *(["## Modelfile", " ".join(modelfile)] if modelfile else []),
        *_gguf(gguf),
        "## Check" if gguf is None else "## Check of the checkpoint it was made from",
        _check(check, form in ("lm_head_lora", "peft"), approximation is not None),
        "## Versions",
        _table({
            **{n: importlib.metadata.version(n) for n in ("qadapter", "torch", "transformers")},
            **{f"{n} (in the check)": version for n, version in check.versions.items()},
        }),
    ]
    policy_card.write_card(folder, "\n\n".join(sections))


def _said_by_its_user(model: QAdapterModel, served: Served) -> str:
    """What the base was called when the adapter was trained, unless that is a place."""
    name = model.base_identity.name
    place = Path(name).is_absolute() or Path(name).expanduser().is_dir()
    return served.base if place else name


def _missing(form: str, tokenizer: bool, transformers_4: bool) -> Sequence[str]:
    lines = []
    if form == "merged" and not tokenizer:
        lines.append("The base came without a tokenizer, and so does this folder.")
    if form == "merged" and not transformers_4:
        lines.append(
            "transformers 4 may read another configuration from `config.json`: take version 5."
        )
    return lines


def _serving(served: Served) -> Iterator[str]:
    """Every engine's commands, and why the others have none."""
    yield (
        "The commands are the engines' own for such a folder, in the one that it lies in. Which of "
        "them were seen running, and where, is in qadapter's `docs/serving.md`."
    )
    found = ways(served)
    for way in found:
        if way.reason:
            continue
        yield f"**{way.engine}**"
        yield "```sh\n" + "\n".join(way.commands) + "\n```"
        asked = f"Requests name the model {markdown_code(way.model)}." if way.model else ""
        if said := " ".join(filter(None, (asked, way.note))):
            yield said
    if reasons := [f"not by {way.engine}: {way.reason}" for way in found if way.reason]:
        yield markdown_list(reasons)
    if served.form in ("lm_head_lora", "peft"):
        yield from _in_python(served)


def _in_python(served: Served) -> Iterator[str]:
    base, folder = repr(one_line(served.base)), repr(one_line(served.folder))
    yield "**PEFT**"
    yield (
        "```python\n"
        f"base = transformers.AutoModelForCausalLM.from_pretrained({base})\n"
        f"model = peft.PeftModel.from_pretrained(base, {folder})\n```"
    )
    if served.base_is_folder:
        yield (
            f"The base has no name on a hub: {markdown_code(served.base)} stands for the folder "
            "where you have it, here as in `adapter_config.json`, where "
            "`AutoPeftModelForCausalLM` looks for it."
        )


def _sampling(form: str, temperature: float, gguf: bool) -> str:
    if gguf:
        return (
            "The output layer holds the policy's own logits: temperatures mean what they mean for "
            f"the base, whose own is {temperature:g}. Engines have defaults of their own."
        )
    if form == "merged":
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


def _check(check: Check, by_peft: bool, approximated: bool) -> str:
    library = "transformers and PEFT" if by_peft else "transformers"
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
