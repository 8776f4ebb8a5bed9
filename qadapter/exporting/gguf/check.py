"""Whether a GGUF file is the checkpoint it was made from, by running both.

Stock transformers reads both in a process of its own and compares weights, settings, tokens and
probabilities; llama.cpp itself does where llama-cpp-python is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qadapter.data.templates import default_of
from qadapter.errors import QAdapterError
from qadapter.exporting import processes
from qadapter.exporting.verification import PROMPTS, TOKENS

_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
)
"""That transformers reads of every architecture's file."""
_TEXT_TOKENS, _ALL_TOKENS = 256, 2048
"""Of each text, and of all, that are measured on."""
_MARGIN = 4.0
"""llama.cpp multiplies by weights of 16 bits in 16 bits, and has tables and other orders of sums.
What that does is bounded by nothing known in advance, so that it is measured: by what bfloat16 does
to this very model. Four times that is far above it, and far below another model."""
_UNITS = {"f32": 2.0**-3, "f16": 2.0**-3, "bf16": 1.0, "q8_0": 1.0}
"""Rounding in llama.cpp beside bfloat16's: its tables are of float16."""
READINGS = (
    "I'm 21, you're 1234567.\n\n\tDON'T   stop —  ça va? Größe: 3,14…",
    "日本語 한국어 العربية हिन्दी 🙂👍🏽 \u00a0x",
    "for (int i = 0; i < n; ++i) { a[i] /= 2; }  \r\n",
)
"""Texts that tokenizers cut in many ways. All is composed: llama.cpp normalizes no text."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a file's probabilities are beside the checkpoint's, over some states."""

    states: int
    kl: float
    """KL(checkpoint ‖ file), nats a token."""
    same_top: int
    """States at which both have the same most likely token."""
    max_logit_error: float


@dataclasses.dataclass(frozen=True)
class GgufCheck:
    """What the comparison found."""

    kind: str
    size: int
    """Bytes."""
    weights: float | None
    """Largest ratio of a weight's error to what rounding to the type explains; at most 1. None:
    stock transformers doesn't read files of this architecture."""
    prompts: Loss | None
    """In transformers, at the tokens that the checkpoint decodes from fixed prompts."""
    texts: Loss | None
    """In transformers, on given texts."""
    llama_cpp: Loss | None
    """llama.cpp's own probabilities, at the fixed prompts' tokens."""
    llama_cpp_answers: int
    """Prompts after which llama.cpp decodes the checkpoint's very tokens …"""
    llama_cpp_prompts: int
    """… of so many."""
    llama_cpp_version: str | None
    unread: str
    """Why transformers doesn't read it."""


def check_gguf(
    file: Path, checkpoint: Path, scratch: Path, kind: str, tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[int]] = (), device: str = "cpu",
) -> GgufCheck:
    """Run a GGUF file beside its checkpoint.

    Args:
        scratch: a folder for the exchange.
        texts: token ids, to measure on beside the fixed prompts.

    Raises:
        QAdapterError: it is another model than the checkpoint; the message says what differs.
    """
    readings = [*PROMPTS, *READINGS, *_conversation(tokenizer)]
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    request = {
        "checkpoint": str(checkpoint), "gguf": str(file), "device": device,
        "threads": torch.get_num_threads(), "prompts": prompts, "texts": _some_of(texts),
        "max_new_tokens": TOKENS, "settings": _SETTINGS,
    }
    found, said = _ask("in_transformers.py", request, scratch)
    tokens = [found[f"tokens.{i}"].tolist() for i in range(len(prompts))]
    in_transformers = weights = on_texts = None
    if not said["unread"]:
        _check_weights(said, kind)
        weights = said["weights"][1]
        in_transformers = _loss(found["checkpoint"], found["gguf"])
        measured = said["measured"]
        if measured["tokens"]:
            on_texts = Loss(measured["tokens"], measured["kl"] / measured["tokens"],
                            measured["same"], float("nan"))
    in_llama_cpp, answers, version = None, 0, None
    if importlib.util.find_spec("llama_cpp") is not None:
        tolerance = _MARGIN * _UNITS[kind] * float(found["rounding"])
        in_llama_cpp, answers, version = _check_llama_cpp(
            file, scratch, prompts, tokens, readings, tokenizer,
            found.get("gguf", found["checkpoint"]), found["checkpoint"], tolerance,
        )
    elif said["unread"]:
        raise QAdapterError(
            f"the GGUF file can't be checked: stock transformers doesn't read it ({said['unread']})"
            ", and llama.cpp isn't there: pip install llama-cpp-python"
        )
    return GgufCheck(
        kind, file.stat().st_size, weights, in_transformers, on_texts, in_llama_cpp, answers,
        len(prompts), version, said["unread"],
    )


def _check_weights(said: Mapping, kind: str) -> None:
    name, ratio = said["weights"]
    if ratio > 1:
        raise _failed(
            f"{name} is off by {ratio:.3g} times what rounding to {kind} explains"
        )
    if said["settings"]:
        name, (ours, theirs) = next(iter(said["settings"].items()))
        raise _failed(f"its {name} is {theirs}, not {ours}")


def _check_llama_cpp(
    file: Path, scratch: Path, prompts: list[list[int]], tokens: list[list[int]],
    readings: list[str], tokenizer: PreTrainedTokenizerBase, expected_NV: Tensor,
    checkpoint_NV: Tensor, tolerance: float,
) -> tuple[Loss, int, str]:
    request = {
        "gguf": str(file), "threads": torch.get_num_threads(), "prompts": prompts,
        "tokens": tokens, "texts": readings,
    }
    found, said = _ask("in_llama_cpp.py", request, scratch)
    for i, text in enumerate(readings):
        ids = tokenizer(text)["input_ids"]
        if found[f"text.{i}"].tolist() != ids:
            raise _failed(
                f"llama.cpp reads {text!r} as {found[f'text.{i}'].tolist()}, not as {ids}"
            )
    error_N = (found["logits"] - expected_NV).abs().nan_to_num(nan=torch.inf).amax(-1)
    if error_N.max() > tolerance:
        raise _failed(
            f"in llama.cpp a logit is off by {error_N.max():.3g}; rounding explains "
            f"{tolerance:.3g} at most"
        )
    same = sum(found[f"greedy.{i}"].tolist() == ids for i, ids in enumerate(tokens))
    return _loss(checkpoint_NV, found["logits"]), same, said["version"]


def _loss(exact_NV: Tensor, found_NV: Tensor) -> Loss:
    exact, found = (x.double().log_softmax(-1) for x in (exact_NV, found_NV))
    return Loss(
        len(exact), float((exact.exp() * (exact - found)).sum(-1).mean()),
        int((exact.argmax(-1) == found.argmax(-1)).sum()),
        float((exact_NV - found_NV).abs().max()),
    )


def _some_of(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    chosen, left = [], _ALL_TOKENS
    for ids in texts:
        ids = list(ids)[: min(left, _TEXT_TOKENS)]
        if ids:
            chosen.append(ids)
        left -= len(ids)
    return chosen


def _conversation(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A chat as the template renders it, special tokens and all."""
    if default_of(tokenizer.chat_template) is None:
        return []
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is it 12 o'clock?"}], tokenize=False,
        add_generation_prompt=True,
    )
    bos = tokenizer.bos_token
    # A tokenizer that adds a bos would read it twice: so do those who render and then read.
    return [text.removeprefix(bos) if bos else text]


def _ask(script: str, request: Mapping, scratch: Path) -> tuple[dict[str, Tensor], dict]:
    """Run a script of this folder; its tensors, and its metadata, which are JSON."""
    found, metadata = processes.ask(
        Path(__file__).with_name(script), request, scratch,
        lambda reason: _failed(f"{script} can't run it ({reason})"),
    )
    return found, {key: json.loads(value) for key, value in metadata.items()}


def _failed(what: str) -> QAdapterError:
    return QAdapterError(f"the GGUF file was checked and is not kept: {what}")
