"""Files that were cut, flipped, exchanged or lost, and what reads them afterwards.

A trial damages a file (or two) of what commands wrote, and runs a command that reads it. Asserted:
no hang, no traceback; an error is one line that names a damaged file; and where there is none, the
command gives what it gives with whole files. A file that was made again to be right in itself (its
digest too) may change results, but nothing may break of it.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import forks
import torch
from kills import RESUME
from places import COMPARE, EVAL, HEAD, JUDGE, LORA, OWN, Places, facts
from safetensors.torch import load_file, save_file

from qadapter.system import manifest


@dataclasses.dataclass(frozen=True)
class Target:
    """Files to damage, and a command that reads them."""

    place: str
    files: tuple[str, ...]
    """Patterns."""
    argv: tuple[str, ...]
    results: tuple[str, ...]
    """Patterns of files that must be as with whole ones."""
    other: str | None = None
    """A place where files of the same names hold something else."""
    unknowable: tuple[str, ...] = ()
    """Patterns of files that nothing says anything about: they may change results."""
    by_folder: bool = False
    """Whether an error may name the folder alone: libraries read these files, and their errors are
    what there is."""


# An adapter says of its base which weights it has, and what of the configuration changes numbers.
_BASE = ("base/tokenizer*", "base/*.jinja", "base/generation_config.json")
_RUN = ("run/*.safetensors", "run/summary.json")
TARGETS: dict[str, Target] = {
    "adapter": Target("plain", ("run/*",), EVAL, ("ev/eval.json",), "plain, another"),
    "lora": Target("plain lora", ("run/*",), EVAL, ("ev/eval.json",), "plain"),
    "resume": Target("broken off", ("run/checkpoint-*/*",), (*HEAD, *RESUME), _RUN,
                     "broken off, another"),
    "resume from": Target("broken off", ("run/checkpoint-4/*",),
                          (*HEAD, RESUME[0], "run/checkpoint-4"), _RUN, "broken off, another"),
    "own samples": Target("held to its own", ("cache/qadapter/own_samples/*.json",),
                          (*OWN, "--overwrite_output_dir"), _RUN),
    "features": Target("cached", ("cache/qadapter/features/*/*",), LORA, _RUN),
    "judged": Target("judged", ("judged/*",), JUDGE, ("judged/*.json*",), by_folder=True),
    "compared": Target("compared", ("compared/**/*",), COMPARE, ("compared/summary-*.json",)),
    "compare": Target("compared, unmeasured", ("compared/**/*",), COMPARE,
                      ("compared/**/validation.json", "compared/summary-*.json")),
    "base": Target("plain", ("base/*",), EVAL, ("ev/eval.json",), None, _BASE, True),
    "export": Target("merged", ("exported/*",), ("eval", "exported", *EVAL[2:]), ("ev/eval.json",),
                     None, ("exported/README.md",), True),
}
SHARES = {"adapter": 20, "lora": 20, "resume": 6, "resume from": 6, "own samples": 2, "features": 4,
          "judged": 4, "compared": 1, "compare": 1, "base": 12, "export": 12}


def undisturbed(target: str, places: Places, home: Path) -> dict[str, str]:
    """What the command gives with whole files."""
    wanted = TARGETS[target]
    if wanted.other:
        places.get(wanted.other)  # here: not by two trials at once
    ended = forks.run(wanted.argv, places.copy(wanted.place, home))
    if ended.code != 0:
        raise SystemExit(f"{target}, undamaged, ended with {ended.code}: {ended.err}")
    return facts(home, wanted.results)


def trial(
    target: str, seed: int, places: Places, whole: dict[str, str], home: Path
) -> tuple[str, str | None]:
    """(what was damaged and how, what is wrong or None)."""
    wanted, rng = TARGETS[target], random.Random(f"{target}:{seed}")
    places.copy(wanted.place, home)
    other = places.get(wanted.other) if wanted.other else None
    there = sorted({p for pattern in wanted.files for p in home.glob(pattern) if p.is_file()})
    damaged, told, kinds, renewed = [], [], set(), False
    for path in rng.sample(there, rng.choice((1, 1, 1, 2)) if len(there) > 1 else 1):
        name = str(path.relative_to(home))
        kind = rng.choice(sorted(DAMAGES))
        if not DAMAGES[kind](path, rng, other / name if other else None, there):
            kind = "cut"
            _cut(path, rng, None, there)
        damaged.append(path)
        kinds.add(kind)
        told.append(f"{name}: {kind}")
        if kind in ("value", "tensor") and rng.random() < 0.5:
            renewed |= _renew_manifest(path)
    how = ", ".join(told) + (", manifest renewed" if renewed else "")
    ended = forks.run(wanted.argv, home)
    if wrong := ended.wrong():
        return how, wrong
    if ended.code == 2:
        known = [path.parent if wanted.by_folder else path for path in damaged]
        named = any(path.name in ended.error for path in known)
        return how, None if named else f"names no damaged file: {ended.error}"
    unknowable = {p for pattern in wanted.unknowable for p in home.glob(pattern)}
    if renewed or unknowable & set(damaged):
        return how, None
    if kinds == {"other"} and manifest.MANIFEST_NAME in {path.name for path in damaged}:
        return how, None  # a file of another folder with that folder's manifest: it is that folder
    found = facts(home, wanted.results)
    differing = [n for n in whole if found.get(n) != whole[n]]
    return how, f"silent: other results in {', '.join(differing)}" if differing else None


# --- damages ------------------------------------------------------------------------------------
# (the file, random numbers, the file of this name elsewhere, all files) → whether it was done.

Damage = Callable[[Path, random.Random, "Path | None", list[Path]], bool]


def _cut(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))])
    return True


def _empty(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    path.write_bytes(b"")
    return True


def _flip(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return bool(data)


def _overwrite(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    """Zeros or noise, as lost blocks of a disk hold."""
    data = bytearray(path.read_bytes())
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    data[start:end] = bytes(end - start) if rng.random() < 0.5 else rng.randbytes(end - start)
    path.write_bytes(data)
    return end > start


def _append(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    data = path.read_bytes()
    path.write_bytes(data + rng.choice((data, b"\n", b"\0" * 100, rng.randbytes(10))))
    return True


def _gone(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    path.unlink()
    return True


def _folder(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    path.unlink()
    path.mkdir()
    return True


def _other(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    """The file of this name from elsewhere, or from another folder of the same kind."""
    choices = [p for p in (other, *files) if p and p.name == path.name and p != path]
    choices = [p for p in choices if p.is_file() and p.read_bytes() != path.read_bytes()]
    if not choices:
        return False
    shutil.copyfile(rng.choice(choices), path)
    return True


def _value(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    """JSON that says something else, or something of another kind."""
    if path.suffix != ".json":
        return False
    try:
        document = json.loads(path.read_text())
    except ValueError:
        return False
    holders = list(_holders(document))
    if not holders:
        return False
    holder, key = rng.choice(holders)
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(STRANGE)
    path.write_text(json.dumps(document))
    return True


STRANGE = (
    None, True, -1, 0, 10**9, 10**30, 1.5, float("nan"), float("inf"), 1e308, "", "nan", "../x",
    "\ud800", "a" * 10_000, "(a+)+$", [], [[]], {}, {"a": 1}, [None], ["q_proj"],
)
"""Values that few places expect."""


def _holders(value: object):
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ()
    )
    for key, item in list(items):
        yield value, key
        yield from _holders(item)


def _tensor(path: Path, rng: random.Random, other: Path | None, files: list[Path]) -> bool:
    """Weights of another kind, shape or name, or that are no numbers, in a proper file."""
    if path.suffix != ".safetensors":
        return False
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(("element", "dtype", "shape", "lost", "more", "renamed", "scaled"))
    if kind == "element":
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(
            (float("nan"), float("inf"), -float("inf"), 1e30)
        )
    elif kind == "dtype":
        tensors[name] = tensor.to(rng.choice(
            (torch.int8, torch.float16, torch.bfloat16, torch.float64, torch.bool)
        ))
    elif kind == "shape":
        tensors[name] = rng.choice((
            tensor.reshape(-1).clone(), tensor[:-1].clone(), torch.cat([tensor, tensor]),
            tensor.reshape(-1)[:0].clone(), tensor[None].clone(),
        ))
    elif kind == "more":
        tensors["more.weight"] = torch.zeros(2)
    elif kind == "scaled":
        tensors[name] = tensor * 1.5 + 0.25
    else:
        del tensors[name]
        if kind == "renamed":
            tensors[f"{name}x"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return True


DAMAGES: dict[str, Damage] = {
    "cut": _cut, "empty": _empty, "flip": _flip, "overwrite": _overwrite, "append": _append,
    "gone": _gone, "folder": _folder, "other": _other, "value": _value, "tensor": _tensor,
}


def _renew_manifest(path: Path) -> bool:
    """As who changes a file on purpose does."""
    listed = path.parent / manifest.MANIFEST_NAME
    if path == listed or not listed.is_file():
        return False
    names = json.loads(listed.read_text())["files"]
    if not all((path.parent / name).is_file() for name in names):
        return False
    manifest.write(path.parent, names)
    return True
