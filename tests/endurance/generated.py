"""Data files, configurations and flags that nobody should have written, through whole commands; and
random numbers through the kernels, held against float64.

Asserted: no hang, no traceback, no more memory than a run on a good file takes and a GiB; an error
is one line; and nothing that was there before is changed or gone.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from functools import cache
from pathlib import Path

import forks
import fuzz
import typer
from hostile.inputs import Hostile, configuration, data_file
from places import EVAL, JUDGE, PLAIN, Places

MOST_MEMORY = 1 << 30
"""Bytes beyond what this process had when it had imported everything."""
_BUILTIN = {"base": "base", "adapter": "run", "pairs": "pairs.jsonl", "out": "out"}
_COMMANDS = {
    "train": (*PLAIN, "--max_steps", "1", "--output_dir", "out"),
    "evaluate": (*EVAL, "--output_dir", "out"),
    "judge": (*JUDGE, "--output_dir", "out"),
    "rewards": ("rewards", "run", "--dataset_name", "pairs.jsonl", "--output_file", "out"),
    "generate": ("generate", "run", "--prompt", "What is blue 1?", "--max_new_tokens", "2"),
}
_VALUES = (
    "", " ", "-1", "0", "1", "2", "0.5", "1e-3", "nan", "inf", "true", "none", "auto", "x", "[]",
    "[1, x]", "{}", "{a: 1}", "{a: [", "../x", "out", "run", "base", "pairs.jsonl", "é", "a\nb",
    "%s", "[[A]]", "&a [*a]", "2026-99-99", "!!int x", "(a+)+$", "--", "head", "lora", "steps",
)
"""Of options. No large numbers: who asks for a billion steps gets them."""


def flags(seed: int) -> Hostile:
    """A command with odd values of a few of its options."""
    rng = random.Random(f"flags {seed}")
    name = rng.choice(sorted(_COMMANDS))
    more = []
    for option in rng.sample(_options(name), rng.randint(1, 3)):
        more += [option, rng.choice(_VALUES)] if rng.random() < 0.95 else [option]
    return Hostile("unused", b"", (*_COMMANDS[name], *more))


@cache
def _options(module: str) -> list[str]:
    build = importlib.import_module(f"qadapter.commands.{module}").app
    parameters = typer.main.get_command(build(show_hidden=True)).params
    return sorted(p.opts[0] for p in parameters if p.opts[0].startswith("--"))


SCENARIOS = {"data": data_file, "configurations": configuration, "flags": flags}
SHARES = {"data": 2, "configurations": 2, "flags": 1}
KERNEL_SHARES = dict.fromkeys(fuzz.TRIALS, 1)


def prepare(scenario: str, places: Places, home: Path) -> int:
    """Most memory that a run may take, bytes: of one that does nothing, and more."""
    home.mkdir()
    places.get("plain")
    return forks.call(lambda: None, home).peak + MOST_MEMORY


def trial(
    scenario: str, seed: int, places: Places, most: int, home: Path
) -> tuple[str, str | None]:
    """(the command, what is wrong or None)."""
    hostile = SCENARIOS[scenario](seed)
    places.copy("plain", home)
    (home / "given").mkdir()
    file = home / "given" / hostile.name
    data = hostile.data
    for name, value in _BUILTIN.items():
        data = data.replace(f"{{{name}}}".encode(), value.encode())
    file.write_bytes(data)
    before = _contents(home)
    argv = [_filled(a, str(file.relative_to(home))) for a in hostile.argv]
    ended = forks.run(argv, home)
    how = f"{' '.join(argv)!r} ended with {ended.code}: {ended.error}"[:600]
    if wrong := ended.wrong():
        return how, wrong
    if ended.peak > most:
        return how, f"took {(ended.peak - most + MOST_MEMORY) >> 20} MiB"
    after = _contents(home)
    lost = [name for name in before if after.get(name) != before[name]]
    return how, f"changed or gone: {', '.join(lost)}" if lost else None


def prepare_kernels(operator: str, places: Places, home: Path) -> None:
    """Nothing: the operators bring their own numbers."""


def kernel_trial(
    operator: str, seed: int, places: Places, prepared: None, home: Path
) -> tuple[str, str | None]:
    """(the operator, what is wrong or None)."""
    try:
        fuzz.trial(operator, seed)
    except fuzz.Failure as failure:
        return operator, str(failure)
    return operator, None


def _filled(argument: str, file: str) -> str:
    for name, value in {**_BUILTIN, "file": file}.items():
        argument = argument.replace(f"{{{name}}}", value)
    return argument


def _contents(home: Path) -> dict[str, str]:
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in home.rglob("*")
        if path.is_file() and not str(path.relative_to(home)).startswith(("cache/", "tmp/"))
    }
