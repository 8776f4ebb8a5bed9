"""Reading a comparison from YAML, strictly; and whether two are the same."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType

from qadapter.compare.config import BASE, OTHER_FILES, CompareConfig, folder_name, swept
from qadapter.compare.kinds import (
    METHODS,
    AdapterSpec,
    BestOfN,
    Interpolated,
    Method,
    OfAnother,
    Prompted,
    QAdapter,
    Replay,
    Reversed,
    retention_names,
)
from qadapter.data.passages import BUILT_IN
from qadapter.errors import QAdapterError, nearest, shown
from qadapter.system.documents import read_yaml
from qadapter.system.hashing import file_sha256
from qadapter.system.markup import one_line

_LONGEST_NAME = 200
"""Bytes: file systems take 255, and a picture's name has more than the name in it."""


def read_config(path: str | Path) -> CompareConfig:
    """Read and check a YAML file. Paths in it are relative to the file.

    Raises:
        QAdapterError: no such file, not YAML, an unknown key, or a value that can't be; the message
            names the key.
    """
    path = Path(path).expanduser()
    written = read_yaml(path)
    if not isinstance(written, dict):
        raise QAdapterError(f"{path}: expected keys and values, got {type(written).__name__}")
    config = _build(CompareConfig, written, str(path), "")
    return _check(dataclasses.replace(config, folder=path.parent), str(path))


def _check(config: CompareConfig, path: str) -> CompareConfig:
    def refuse(key: str, why: str) -> typing.NoReturn:
        raise QAdapterError(f"{path}: {key}: {why}")

    if not config.methods:
        refuse("methods", "there is nothing to compare")
    _check_seeds(config, refuse)
    if config.first is not None and config.old is None:
        refuse("first", "the base can learn first only what old data hold (the key old)")
    specs = {f"methods.{name}.adapter": m.adapter for name, m in config.methods.items()}
    for key, spec in {"adapter": config.adapter, **specs}.items():
        try:
            if spec is not None:
                spec.check()
        except ValueError as error:
            refuse(key, str(error))
    for name, method in config.methods.items():
        if not name.strip():
            refuse("methods", "a method's name is empty")
        if name == BASE:
            refuse(f"methods.{name}", "the base is always compared; choose another name")
        if isinstance(method, Replay) and config.old is None:
            refuse(f"methods.{name}", "replay needs old data (the key old)")
        if isinstance(method, Prompted) and not method.system.strip():
            refuse(f"methods.{name}.system", "is missing")
        if isinstance(method, Prompted) and config.evaluation.prompts == 0:
            refuse(f"methods.{name}", "nothing is asked where evaluation.prompts is 0")
        if not method.trained and (method.adapter or method.learning_rate is not None):
            refuse(f"methods.{name}", "what is not trained takes no adapter and no learning_rate")
        if isinstance(method, OfAnother):
            _check_of(config, name, method, refuse)
        try:
            method.check(config.training)
        except ValueError as error:
            refuse(f"methods.{name}", str(error))
    pictures: dict[str, str] = {}
    for name, sweep in config.sweeps.items():
        _check_name(name, "sweeps", refuse)
        if (other := pictures.setdefault(folder_name(name), name)) != name:
            refuse(f"sweeps.{name}", f"its picture would be that of {other!r}; rename one")
        if sweep.of not in config.methods:
            refuse(f"sweeps.{name}.of", f"no method is called {sweep.of!r}"
                   + nearest(sweep.of, config.methods))
        method = config.methods[sweep.of]
        if not method.trained:
            refuse(f"sweeps.{name}.of", f"{method.kind} is not trained")
        known = {f.name for f in dataclasses.fields(method)} - {"seeds", "adapter", "of"}
        known |= {f"adapter.{f.name}" for f in dataclasses.fields(AdapterSpec)
                  if f.type in ("str", "int", "float", "int | None")}
        missing = [n for n in swept(sweep.option) if n not in known]
        if missing:
            refuse(f"sweeps.{name}.option", f"{method.kind} has no {missing[0]!r}"
                   + nearest(missing[0], known))
        if not sweep.values or len(set(sweep.values)) < len(sweep.values):
            refuse(f"sweeps.{name}.values", f"expected different values, got {sweep.values}")
        for value in sweep.values:
            try:
                varied = config.varied(method, sweep.option, value)
                varied.check(config.training)
                (varied.adapter or config.adapter).check()
            except ValueError as error:
                refuse(f"sweeps.{name}.values", f"{shown(value)}: {error}")
    taken: dict[str, str] = {}
    for row in config.rows():
        _check_name(row.name, "methods", refuse)
        folder = folder_name(row.name)
        if folder.startswith(".") or folder in OTHER_FILES:
            refuse(f"methods.{row.name}", "no folder can have this name; choose another")
        if (other := taken.setdefault(folder, row.name)) != row.name:
            refuse(f"methods.{row.name}", f"its folder would be that of {other!r}; rename one")
        if isinstance(row.method, OfAnother):
            of = config.methods[row.method.of]
            missing = set(row.seeds) - set(config.seeds if of.seeds is None else of.seeds)
            if missing:
                key = f"methods.{row.name}" if row.sweep is None else f"sweeps.{row.sweep}"
                refuse(f"{key}.seeds", f"{row.method.of} has no seed {min(missing)}")
    names = [BASE, *(row.name for row in config.rows())]
    if config.reference is not None and config.reference not in names:
        refuse("reference", f"no row is called {config.reference!r}"
               + nearest(config.reference, names))
    if any(w < 0 for w in config.evaluation.strengths):
        refuse("evaluation.strengths", "a strength must not be negative")
    texts = [texts.name for texts in config.evaluation.retention]
    if not texts or len(set(texts)) < len(texts):
        refuse("evaluation.retention", f"expected texts of different names, got {texts}")
    for name in texts:
        _check_name(name, "evaluation.retention", refuse)
    for text in config.evaluation.retention:
        if text.unseen is not None and text.file != BUILT_IN:
            refuse(f"evaluation.retention.{text.name}.unseen", f"is for the file {BUILT_IN}")
        for name, method in config.methods.items():
            if text.file in retention_names(method) and not text.unseen:
                way_out = "unseen: true" if text.file == BUILT_IN else "other texts"
                refuse(f"evaluation.retention.{text.name}", f"{text.file} is what {name} is held "
                       f"to: measure on {way_out}")
    if config.dtype != "auto" and not isinstance(getattr(torch, config.dtype, None), torch.dtype):
        refuse("dtype", f"expected auto or a torch dtype as bfloat16, got {config.dtype!r}")
    schedules = [schedule.value for schedule in SchedulerType]
    if (schedule := config.training.lr_scheduler_type) not in schedules:
        refuse("training.lr_scheduler_type", f"expected one of {', '.join(schedules)}, got "
               f"{schedule!r}")
    _check_ranges(config, refuse)
    return config


def _check_name(name: str, key: str, refuse: Callable[[str, str], typing.NoReturn]) -> None:
    """Before anything runs: names become folders, files and columns when it is done."""
    if not name.strip():
        refuse(key, "a name is empty")
    if one_line(name) != name:
        refuse(key, f"{name!r:.200} can't be a name: it is not one line of plain text")
    if len(name.encode()) > _LONGEST_NAME:
        refuse(key, f"{name!r:.40}… can't be a name: no file can have one of {len(name.encode())} "
               f"bytes (at most {_LONGEST_NAME})")


def _check_seeds(config: CompareConfig, refuse: Callable[[str, str], typing.NoReturn]) -> None:
    """As torch and numpy take them, and none twice: it would count double."""
    named = {"seeds": config.seeds}
    for key in ("methods", "sweeps"):
        named |= {f"{key}.{n}.seeds": part.seeds for n, part in getattr(config, key).items()}
    for key, seeds in named.items():
        if seeds is not None and (
            not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**32 for s in seeds)
        ):
            refuse(key, f"expected different whole numbers from 0 up to 2³² − 1, got {seeds}")


_AT_LEAST = {
    "data": dict.fromkeys(
        ("max_rows", "max_length", "train", "validation", "test", "judge", "pairs_per_prompt"), 1
    ),
    "first": {"rank": 1, "per_device_train_batch_size": 1, "seed": 0},
    "training": {"per_device_train_batch_size": 1, "curve_points": 1, "warmup_steps": 0,
                 "max_grad_norm": 0},
    "evaluation": {"prompts": 0, "old_prompts": 1, "samples": 1, "base_samples": 1,
                   "max_new_tokens": 1, "dial_seeds": 0, "batch_size": 1, "seed": 0},
}
_POSITIVE = {
    "first": ("beta", "learning_rate", "num_train_epochs"),
    "training": ("num_train_epochs", "learning_rate"),
    "evaluation": ("temperature",),
}


def _check_ranges(config: CompareConfig, refuse: Callable[[str, str], typing.NoReturn]) -> None:
    for key in ("data", "old", "first", "training", "evaluation"):
        if (part := getattr(config, key)) is None:
            continue
        kind = "data" if key == "old" else key
        for name, least in _AT_LEAST[kind].items():
            if (value := getattr(part, name)) is not None and value < least:
                refuse(f"{key}.{name}", f"must be at least {least}, got {value}")
        for name in _POSITIVE.get(kind, ()):
            if (value := getattr(part, name)) <= 0:
                refuse(f"{key}.{name}", f"must be positive, got {value}")
    for texts in config.evaluation.retention:
        for name in ("max_texts", "max_length"):
            if (value := getattr(texts, name)) is not None and value < 1:
                refuse(f"evaluation.retention.{texts.name}.{name}",
                       f"must be at least 1, got {value}")


def _check_of(
    config: CompareConfig, name: str, method: OfAnother,
    refuse: Callable[[str, str], typing.NoReturn],
) -> None:
    key, of = f"methods.{name}.of", config.methods.get(method.of)
    if of is None or not of.trained:
        refuse(key, f"no trained method is called {method.of!r}"
               + nearest(method.of, [n for n, m in config.methods.items() if m.trained]))
    if isinstance(method, BestOfN) and isinstance(of, BestOfN):
        refuse(key, f"{method.of} is best_of_n itself: name the row that rewards")
    if isinstance(method, Reversed) and (of.adapter or config.adapter).kind != "head":
        refuse(key, "only a head adapter can be reversed")
    if (isinstance(method, Interpolated) and isinstance(of, QAdapter)
            and of.parametrization != "policy"):
        refuse(key, f"at weight 0 {method.of} is not the base: its stream is no policy "
               f"(parametrization {of.parametrization})")


def _build(cls: type, written: Any, path: str, key: str) -> Any:
    """A dataclass from a mapping; unknown keys, missing ones and wrong types are named."""
    where = f"{path}: {key}" if key else path
    if not isinstance(written, Mapping):
        raise QAdapterError(f"{where}: expected keys and values, got {shown(written)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("in_file", True)}
    for name in written:
        if name not in fields:
            raise QAdapterError(f"{where}: unknown key {shown(name)}" + nearest(str(name), fields))
    missing = [
        name for name, f in fields.items() if name not in written
        and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise QAdapterError(f"{where}: {missing[0]} is missing")
    return cls(**{
        name: _value(hints[name], value, path, f"{key}.{name}" if key else name)
        for name, value in written.items()
    })


def _value(kind: Any, value: Any, path: str, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        *others, last = [a for a in arguments if a is not type(None)]
        for other in others:
            with contextlib.suppress(QAdapterError):
                return _value(other, value, path, key)
        return _value(last, value, path, key)
    if kind is Method:
        return _method(value, path, key)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path, key)
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], v, path, f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        if len({str(k) for k in value}) < len(value):
            raise QAdapterError(f"{path}: {key}: two keys read alike: {shown(list(value))}")
        return {str(k): _value(arguments[1], v, path, f"{key}.{k}") for k, v in value.items()}
    plain = origin or kind
    if plain is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as text
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise QAdapterError(f"{path}: {key}: expected a finite number, got {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise QAdapterError(f"{path}: {key}: expected a number of 64 bits at most, got {value}")
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise QAdapterError(f"{path}: {key}: expected {plain.__name__}, got {shown(value)}")
    return value


def _method(value: Any, path: str, key: str) -> Method:
    options = dict(value) if isinstance(value, Mapping) else {}
    kind = options.pop("method", None)
    if not isinstance(kind, str) or kind not in METHODS:
        raise QAdapterError(
            f"{path}: {key}.method: expected one of {', '.join(METHODS)}, got {shown(kind)}"
            + nearest(str(kind), METHODS)
        )
    return _build(METHODS[kind], options, path, key)


# --- the same comparison? -----------------------------------------------------------------------


def fingerprint_files(config: CompareConfig) -> dict[str, str]:
    """SHA-256 of every local file or folder the comparison reads, by the key that names it."""
    named = {"data.dataset_name": config.data.dataset_name,
             "model_name_or_path": config.model_name_or_path}
    if config.old is not None:
        named["old.dataset_name"] = config.old.dataset_name
    if config.chat_template is not None:
        named["chat_template"] = config.chat_template
    for texts in config.evaluation.retention:
        named[f"evaluation.retention.{texts.name}"] = texts.file
    for name, method in config.methods.items():
        for i, file in enumerate(retention_names(method)):
            named[f"methods.{name}.retention_dataset_name[{i}]"] = file
    found = {key: Path(config.find(name)) for key, name in named.items()}
    return {key: _sha256(path) for key, path in found.items() if path.exists()}


def _sha256(path: Path) -> str:
    """Of a file; of a folder's files with their names."""
    if path.is_file():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = [f"{file.relative_to(path).as_posix()} {file_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def changes(before: Any, now: Any, key: str = "") -> list[str]:
    """What differs between two written configurations, by name: ``methods.dpo.beta: 0.1 → 0.3``.
    Methods, sweeps, seeds and seeds with a dial may be added to a comparison: finished runs stay
    what they are; its title and what is compared with what may change."""
    if isinstance(before, dict) and isinstance(now, dict):
        growing = key in ("methods", "sweeps")
        names = before.keys() | (set() if growing else now.keys())
        return [
            line for name in sorted(names) if not (growing and name not in now)
            for line in changes(before.get(name), now.get(name), f"{key}.{name}".strip("."))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now) and all(
        isinstance(x, dict) for x in (*before, *now)
    ):
        # One by one, as an option that came later is none in what was written before it.
        return [
            line for number, pair in enumerate(zip(before, now, strict=True), 1)
            for line in changes(*pair, f"{key}.{number}")
        ]
    if key.split(".")[-1] in ("seeds", "dial_seeds", "title", "reference") or before == now:
        return []
    return [f"{key}: {shown(before)} → {shown(now)}"]
