"""What serves which export, by which commands: one table, which cards, docs/serving.md and the
engines' own tests read.

What an engine does with a form was seen running, or stands in its source, at the versions of
``SEEN``; other versions may take more.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from qadapter.system.markup import one_line

ENGINES = ("transformers serve", "vLLM", "SGLang", "llama.cpp", "Ollama")
SEEN = {
    "transformers serve": "5.23", "vLLM": "0.32", "llama.cpp": "of llama-cpp-python 0.3.36",
}
"""Versions that were looked at; the other engines' commands are those of their documentation."""
ADAPTER_NAME = "custom"
"""What requests call a LoRA that is served beside its base."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
_VLLM_VOCABULARY = 258_048
"""Tokens at most beside a LoRA on the output layer."""
_VLLM_HEAD_LORA = (
    "llama", "qwen3", "qwen3_moe", "mixtral", "granite", "granitemoe", "granitemoehybrid", "phimoe",
    "nemotron", "exaone4", "exaone_moe", "apertus", "lfm2", "lfm2_moe", "falcon_h1", "jamba",
    "minicpm", "solar",
)
"""Architectures whose output layer takes a LoRA in vLLM."""
_TYING = {
    "SGLang": ("gemma", "gemma2", "cohere", "cohere2"),
    "vLLM": ("gemma2", "gemma3n_text", "cohere", "cohere2"),
    "llama.cpp": ("gemma", "gemma2", "cohere", "cohere2"),
}
"""Architectures whose output layer is the input embedding there, whatever a checkpoint says."""
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""That hold weights of a dtype as they are."""


@dataclass(frozen=True)
class Served:
    """What of an export decides how it is served. The defaults stand in the documentation."""

    form: str
    folder: str
    """As commands are to name it."""
    base: str = "BASE"
    """Name or folder of the base."""
    base_is_folder: bool = True
    rank: int = 128
    """Of a LoRA."""
    temperature: float = 1.0
    """That samples the policy."""
    tied: bool = False
    """Whether the output layer is the input embedding: in a checkpoint itself, of a LoRA's base."""
    model_type: str = "llama"
    vocab_size: int = 128_256
    dtype: str = "bfloat16"
    """Of the weights that are written, or of the base's."""
    beyond_lora: Sequence[str] = ()
    """What a PEFT adapter has that two matrices a layer are not, such as "DoRA"."""


@dataclass(frozen=True)
class Way:
    """How an engine serves an export, or why it doesn't."""

    engine: str
    commands: tuple[str, ...] = ()
    """For a shell, in their order, from the folder that the export lies in. The last one serves.
    None at all: it can't."""
    model: str = ""
    """What requests name as the model; "": the engine takes any name."""
    reason: str = ""
    """Why it can't."""
    note: str = ""
    """What else is to be known."""


def ways(export: Served) -> list[Way]:
    """Every engine's way to serve an export, in the order of ``ENGINES``."""
    found = []
    for engine in ENGINES:
        limits = _LIMITS.get((engine, export.form), ())
        reason = next((limit.reason(export) for limit in limits if limit.holds(export)), "")
        if reason:
            found.append(Way(engine, reason=reason))
        else:
            found.append(replace(_COMMANDS[engine, export.form](export), engine=engine))
    return found


def limits(engine: str, form: str) -> list[str]:
    """What an engine doesn't serve of a form, in words for all exports of it."""
    return [limit.summary for limit in _LIMITS.get((engine, form), ()) if limit.summary]


def vllm_rank(rank: int) -> int | None:
    """The least that vLLM takes as --max-lora-rank for a LoRA; None: there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


# --- what can't be ------------------------------------------------------------------------------


class _Limit(NamedTuple):
    """Holds for some exports of a form, and then is the reason why an engine can't serve them."""

    holds: Callable[[Served], bool]
    reason: Callable[[Served], str]
    summary: str
    """The same for all exports of the form."""


_MERGE = "take form merged"


def _never(reason: str) -> _Limit:
    return _Limit(lambda export: True, lambda export: reason, f"not served: {reason}")


def _tying(engine: str, what: str) -> _Limit:
    types = _TYING[engine]
    return _Limit(
        lambda export: export.model_type in types and not export.tied,
        lambda export: f"its {export.model_type} takes the input embedding for the output layer: "
        f"{what}. A LoRA in the trunk can be merged and served",
        f"no linear head adapters of {', '.join(types)}, where the output layer is the input "
        f"embedding: {what}",
    )


_BEYOND_LORA = _Limit(
    lambda export: bool(export.beyond_lora),
    lambda export: f"it reads LoRA's two matrices alone, not {', '.join(export.beyond_lora)}: "
    f"{_MERGE}",
    "LoRA's two matrices alone: no DoRA, none of PEFT's other kinds",
)
_VLLM_RANK = _Limit(
    lambda export: vllm_rank(export.rank) is None,
    lambda export: f"rank {export.rank} is above {VLLM_RANKS[-1]}, its largest: {_MERGE}",
    f"ranks to {VLLM_RANKS[-1]}; what `--max-lora-rank` takes is "
    f"{', '.join(map(str, VLLM_RANKS))}",
)
_LIMITS: dict[tuple[str, str], tuple[_Limit, ...]] = {
    **{
        ("transformers serve", form): (_never(reason),)
        for form, reason in {
            "lm_head_lora": f"it serves no PEFT folder: {_MERGE}",
            "peft": f"it serves no PEFT folder: {_MERGE}",
            "gguf": f"{_MERGE}, which a GGUF is made from",
            "ollama": f"{_MERGE}, which a GGUF is made from",
        }.items()
    },
    ("vLLM", "merged"): (_tying(
        "vLLM", "one of its own is refused, or left out without a word (Cohere)"
    ),),
    ("vLLM", "lm_head_lora"): (
        _Limit(
            lambda export: export.model_type not in _VLLM_HEAD_LORA,
            lambda export: f"its {export.model_type} has no LoRA on the output layer: {_MERGE}",
            f"only {', '.join(_VLLM_HEAD_LORA[:6])} and a few others: not mistral, qwen2, phi3, "
            "gemma",
        ),
        _Limit(
            lambda export: export.vocab_size > _VLLM_VOCABULARY,
            lambda export: f"{export.vocab_size:,} tokens are more than the {_VLLM_VOCABULARY:,} "
            f"that it takes beside a LoRA on the output layer: {_MERGE}",
            f"vocabularies to {_VLLM_VOCABULARY:,} tokens",
        ),
        _VLLM_RANK,
    ),
    ("vLLM", "peft"): (_BEYOND_LORA, _VLLM_RANK),
    ("SGLang", "merged"): (_tying("SGLang", "one of its own is left out without a word"),),
    ("SGLang", "lm_head_lora"): (_Limit(
        lambda export: export.model_type in _TYING["SGLang"],
        lambda export: f"its {export.model_type} has no output layer of its own",
        "",
    ),),
    ("SGLang", "peft"): (_BEYOND_LORA,),
    ("llama.cpp", "merged"): (_tying(
        "llama.cpp", "one of its own is left out by the converter without a word (Gemma), or "
        "refused by the loader (Cohere)"
    ),),
    ("llama.cpp", "lm_head_lora"): (_Limit(
        lambda export: export.tied,
        lambda export: "the base's output layer is its input embedding: the LoRA converts, and the "
        f"loader then refuses it: {_MERGE}",
        "only bases with an output layer of their own: where it is the input embedding, the LoRA "
        f"converts and is refused when it is loaded: {_MERGE}",
    ), _Limit(
        lambda export: export.model_type in _TYING["llama.cpp"],
        lambda export: f"its {export.model_type} has no output layer of its own",
        "",
    )),
    ("llama.cpp", "peft"): (_BEYOND_LORA,),
    ("Ollama", "lm_head_lora"): (_never(f"no LoRA on an output layer: {_MERGE}"),),
    ("Ollama", "peft"): (_BEYOND_LORA, _Limit(
        lambda export: export.model_type not in ("llama", "mistral", "mixtral", "gemma", "gemma2"),
        lambda export: f"it takes LoRA for Llama, Mistral and Gemma alone: {_MERGE}",
        "only bases of Llama, Mistral and Gemma",
    )),
    **{
        (engine, form): (_never(f"{_MERGE}, which a GGUF is made from"),)
        for engine in ("vLLM", "SGLang") for form in ("gguf", "ollama")
    },
}
_LIMITS["Ollama", "merged"] = _LIMITS["llama.cpp", "merged"]


# --- commands -----------------------------------------------------------------------------------


def _words(*words: str) -> str:
    """A shell's line, whatever names hold."""
    return shlex.join(one_line(word) for word in words)


def _place(export: Served) -> str:
    """Its folder; one whose name would pass for an option, with its place."""
    return f"./{export.folder}" if export.folder.startswith("-") else export.folder


def _dtype(export: Served) -> tuple[str, ...]:
    """vLLM and SGLang serve weights of 32 bits in 16 unless they are told."""
    return ("--dtype", "float32") if export.dtype == "float32" else ()


def _temperature_of_requests(export: Served) -> str:
    if export.temperature == 1.0:
        return ""
    return (
        "It reads the base's generation config, not this folder's: send "
        f"`\"temperature\": {export.temperature:.6g}` with each request."
    )


def _transformers(export: Served) -> Way:
    return Way("", (_words("transformers", "serve", _place(export)),), _place(export))


def _vllm(export: Served) -> Way:
    return Way("", (_words("vllm", "serve", _place(export), *_dtype(export)),), _place(export))


def _sglang(export: Served) -> Way:
    return Way("", (_words(*_SGLANG, _place(export), *_dtype(export)),), _place(export))


def _vllm_lora(export: Served) -> Way:
    return Way("", (_words(
        "vllm", "serve", export.base, *_dtype(export), "--enable-lora", "--max-lora-rank",
        str(vllm_rank(export.rank)), "--lora-modules", f"{ADAPTER_NAME}={_place(export)}",
    ),), ADAPTER_NAME, note=_temperature_of_requests(export))


def _sglang_lora(export: Served) -> Way:
    # Its other backend has no LoRA on output layers.
    backend = ("--lora-backend", "triton") if export.form == "lm_head_lora" else ()
    return Way("", (_words(
        *_SGLANG, export.base, *_dtype(export), "--enable-lora", "--lora-paths",
        f"{ADAPTER_NAME}={_place(export)}", *backend,
    ),), ADAPTER_NAME, note=_temperature_of_requests(export))


_SGLANG = ("python", "-m", "sglang.launch_server", "--model-path")


def _base_folder(export: Served) -> tuple[tuple[str, ...], str]:
    """(what fetches the base, its folder): converters read folders alone."""
    if export.base_is_folder:
        return (), export.base
    folder = export.base.rpartition("/")[2]
    return (_words("hf", "download", export.base, "--local-dir", folder),), folder


def _to_gguf(export: Served, folder: str, gguf: str) -> str:
    return _words(
        "python", "convert_hf_to_gguf.py", folder, "--outfile", gguf, "--outtype",
        GGUF_TYPES.get(export.dtype, "auto"),
    )


def _llama_server(export: Served, *words: str) -> Way:
    """The policy itself: by default llama.cpp cuts what is unlikely."""
    return Way("", (_words(
        "llama-server", *words, "--temp", f"{export.temperature:.6g}", "--top-k", "0", "--top-p",
        "1", "--min-p", "0",
    ),))


def _llama_merged(export: Served) -> Way:
    gguf = f"{_place(export)}.gguf"
    served = _llama_server(export, "--model", gguf)
    return replace(served, commands=(_to_gguf(export, _place(export), gguf), *served.commands))


def _llama_lora(export: Served) -> Way:
    gguf = f"{_place(export)}.gguf"
    fetched, base = _base_folder(export)
    served = _llama_server(export, "--model", "base.gguf", "--lora", gguf)
    return replace(served, commands=(
        *fetched, _to_gguf(export, base, "base.gguf"),
        _words("python", "convert_lora_to_gguf.py", _place(export), "--base", base,
               "--outfile", gguf),
        *served.commands,
    ))


def _llama_gguf(export: Served) -> Way:
    return _llama_server(export, "--model", _gguf_of(export))


def _gguf_of(export: Served) -> str:
    return f"{_place(export)}/{export.folder}.gguf"


def _ollama(export: Served, *lines: str, fetched: tuple[str, ...] = ()) -> Way:
    name = _ollama_name(export)
    lines += (f"PARAMETER temperature {export.temperature:.6g}", *OLLAMA_UNCUT)
    return Way("", (
        *fetched, f"printf '%s\\n' {_words(*lines)} > Modelfile",
        _words("ollama", "create", name, "-f", "Modelfile"), _words("ollama", "run", name),
    ), name, note="It builds prompts by the Modelfile's TEMPLATE, not by the chat template: write "
       "one, unless it names one itself when it creates the model.")


OLLAMA_UNCUT = tuple(
    f"PARAMETER {name}" for name in ("top_k 0", "top_p 1", "min_p 0", "repeat_penalty 1")
)
"""Lines of a Modelfile that leave sampling as it is: by default Ollama cuts and penalises."""


def _ollama_name(export: Served) -> str:
    return re.sub("[^a-z0-9._-]+", "-", export.folder.lower()).strip("-.") or ADAPTER_NAME


def _ollama_merged(export: Served) -> Way:
    return _ollama(export, f"FROM {_from(export.folder)}")


def _ollama_lora(export: Served) -> Way:
    fetched, base = _base_folder(export)
    return _ollama(
        export, f"FROM {_from(base)}", f"ADAPTER {_from(export.folder)}", fetched=fetched
    )


def _ollama_gguf(export: Served) -> Way:
    return _ollama(export, f"FROM {_from(_gguf_of(export))}")


def _ollama_folder(export: Served) -> Way:
    name = _ollama_name(export)
    return Way("", (
        _words("ollama", "create", name, "-f", f"{_place(export)}/Modelfile"),
        _words("ollama", "run", name),
    ), name)


def _from(place: str) -> str:
    """Other names would be those of Ollama's library."""
    return place if place.startswith(("/", "./", "../")) else f"./{place}"


_COMMANDS: dict[tuple[str, str], Callable[[Served], Way]] = {
    ("transformers serve", "merged"): _transformers,
    ("vLLM", "merged"): _vllm,
    ("vLLM", "lm_head_lora"): _vllm_lora,
    ("vLLM", "peft"): _vllm_lora,
    ("SGLang", "merged"): _sglang,
    ("SGLang", "lm_head_lora"): _sglang_lora,
    ("SGLang", "peft"): _sglang_lora,
    ("llama.cpp", "merged"): _llama_merged,
    ("llama.cpp", "lm_head_lora"): _llama_lora,
    ("llama.cpp", "peft"): _llama_lora,
    ("llama.cpp", "gguf"): _llama_gguf,
    ("llama.cpp", "ollama"): _llama_gguf,
    ("Ollama", "merged"): _ollama_merged,
    ("Ollama", "peft"): _ollama_lora,
    ("Ollama", "gguf"): _ollama_gguf,
    ("Ollama", "ollama"): _ollama_folder,
}
