"""PEFT configurations that others wrote: looked at before anything is built by them."""

from __future__ import annotations

import enum
import json
import math
import re
import subprocess
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qadapter.errors import QAdapterError, beginning, nearest, shown
from qadapter.system.documents import MAX_CONFIG_BYTES, read_json
from qadapter.trunk.shells import depth_of

MAX_PATTERN_SECONDS = 10
"""Of processor time that the patterns of a configuration may take on a base's module names."""
_IGNORED = ("runtime_config",)
"""Fields that PEFT doesn't read from a file."""

_CHANGING_THE_BASE = {
    "bias": ("none", "biases belong to the frozen base"),
    "layer_replication": (None, "the base has no such layers"),
    "trainable_token_indices": (None, "the base's tokens are frozen"),
    "megatron_config": (None, "Megatron layers are not supported"),
}


def read_config(path: Path) -> PeftConfig:
    """What an ``adapter_config.json`` says.

    Raises:
        QAdapterError: it is none; a value of a wrong type, an infinite number; something switched
            on that the installed PEFT doesn't know. The message names the file and the field.
    """
    fields = read_json(path, most=MAX_CONFIG_BYTES)
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    known = {str(k.value): config for k, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(kind, str) or kind not in known:
        raise QAdapterError(
            f"{path}: not a PEFT configuration: peft_type is {shown(kind)}"
            f"{nearest(kind, known) if isinstance(kind, str) else ''}"
        )
    hints = typing.get_type_hints(known[kind])
    for name, value in fields.items():
        if name in hints and not _fits(value, hints[name]):
            raise QAdapterError(
                f"{path}: not a PEFT configuration: {name} is {shown(value)}, not "
                f"{_as_text(hints[name])}"
            )
        if name not in hints and (value is True or (isinstance(value, (list, dict)) and value)):
            raise QAdapterError(
                f"{path}: {shown(name)} is {shown(value)}, and the installed PEFT knows no such "
                f"field of {kind}: it may need a newer one"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields it doesn't know, which say nothing
            return PeftConfig.from_peft_type(
                **{name: x for name, x in fields.items() if name not in _IGNORED}
            )
    except Exception as error:  # a class for each kind of adapter, with checks of its own
        raise QAdapterError(f"{path}: not a PEFT configuration: {beginning(error)}") from error


def require_adapting(config: PeftConfig) -> None:
    """Raises QAdapterError for a configuration that adapts no layers, or changes the base."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise QAdapterError(f"{config.peft_type.value} adapts no layers: use LoRA")
    for field, (allowed, reason) in _CHANGING_THE_BASE.items():
        if getattr(config, field, allowed) not in (allowed, [], {}):
            raise QAdapterError(f"{field}={shown(getattr(config, field))} can't be used: {reason}")
    if config.peft_type == PeftType.ADALORA:
        raise QAdapterError("AdaLoRA needs a schedule of ranks of its own: use LoRA")


def require_matching(config: PeftConfig, names: Iterable[str]) -> None:
    """See that every pattern of a configuration comes to an end, in a process that can be stopped.

    Args:
        names: of the base's modules, which PEFT holds the patterns against.

    Raises:
        QAdapterError: one takes longer than ``MAX_PATTERN_SECONDS``.
    """
    patterns = sorted(set(_patterns(config.to_dict())))
    if not patterns:
        return
    tried = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TRY, str(MAX_PATTERN_SECONDS)], check=False,
        input=json.dumps([patterns, sorted(names)]), capture_output=True, text=True,
    )
    if tried.returncode != 0:
        pattern = patterns[min(tried.stdout.count("\n"), len(patterns) - 1)]
        raise QAdapterError(
            f"the pattern {shown(pattern)} takes more than {MAX_PATTERN_SECONDS} s on this base's "
            "module names: write it without repetitions inside repetitions, or list the modules"
        )


_TRY = r"""
import json, re, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    # PEFT matches whole names, their ends, their parts, and what stands before a layer's number.
    for before, after in (("", ""), (r"(.*\.)?(", ")$"), (r"(^|.*\.)", r"($|\..*)"),
                          (r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.")):
        try:
            compiled = re.compile(before + pattern + after)
        except (re.error, OverflowError, RecursionError):
            continue
        for name in names:
            compiled.fullmatch(name)
            compiled.match(name)
    print(flush=True)
"""


def _patterns(value: Any) -> Iterator[str]:
    """Texts, wherever they are in a configuration, that can match in more than one way."""
    if isinstance(value, str):
        if re.search(r"[*+?{|]", value):
            yield str(value)
    elif isinstance(value, dict):
        for name, x in value.items():
            yield from _patterns(name)
            yield from _patterns(x)
    elif isinstance(value, (list, tuple, set)):
        for x in value:
            yield from _patterns(x)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type, as far as that is simple. A whole number may stand
    where PEFT says float and the other way round: its own files do so."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) for one in arguments)
    if hint in (int, float):
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (str, bool):
        return type(value) is hint
    if hint is Any:
        return True
    if hint in (None, type(None)):
        return value is None
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list) and all(_fits(x, inner) for x in value)
    if origin is dict or hint is dict:
        inner = arguments[1] if arguments else Any
        return isinstance(value, dict) and all(_fits(x, inner) for x in value.values())
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str)
    return isinstance(value, dict) if isinstance(hint, type) else True


def _as_text(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_as_text, arguments)))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, arguments))
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))


ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output's."""


def in_upper_blocks(
    number: int | None, targets: list[str] | str | None, base: PreTrainedModel | None,
    option: str,
) -> dict[str, Any]:
    """A LoRA's ``target_modules``, and ``layers_to_transform`` where it is in a base's upper blocks
    alone. PEFT takes a list of names with those and no text, so that ``all-linear`` is spelled out;
    where other blocks hold layers of those names (a vision tower's), ``layers_pattern`` says whose
    numbers are meant.

    Args:
        number: of upper blocks; none for all.
        base: not asked where it is all.
        option: what asks for so many blocks, for messages.

    Raises:
        QAdapterError: the base has fewer, or the layers are told by a pattern.
    """
    if number is None:
        return {"target_modules": targets}
    depth = depth_of(base)
    if number > depth:
        raise QAdapterError(f"{option}={number}: the base has {depth} blocks")
    path, blocks = _text_blocks(base, depth)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = sorted(_linear_names(blocks[depth - number :]))
    if isinstance(targets, str):
        raise QAdapterError(
            f"{option}={number}: the layers of some blocks are told by a list of names or by "
            f"{ALL_LINEAR}, not by the pattern {shown(targets)}"
        )
    found = {"layers_to_transform": list(range(depth - number, depth)), "target_modules": targets}
    _, _, below = path.partition(".")  # PEFT wants something before it
    if below and not _linear_names([base], without=blocks).isdisjoint(targets or ()):
        found["layers_pattern"] = re.escape(below)
    return found


def _text_blocks(base: PreTrainedModel, depth: int) -> tuple[str, nn.ModuleList]:
    """The blocks that text runs through, and their name in the base."""
    reached = set(base.get_decoder().modules())
    found = [
        (name, module) for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and module in reached
    ]
    if not found:
        raise QAdapterError(
            f"{type(base).__name__} has no list of {depth} blocks: put the LoRA in all, or in "
            "layers told by a pattern"
        )
    return found[0]


def _linear_names(modules: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> set[str]:
    """The last names of linear layers."""
    left_out = {inner for module in without for inner in module.modules()}
    return {
        name.rpartition(".")[2] for module in modules for name, inner in module.named_modules()
        if isinstance(inner, nn.Linear | Conv1D) and inner not in left_out
    }
