"""``qadapter plan``: what ``qadapter train`` with the same options will need."""

from __future__ import annotations

import json
import shlex
from typing import Any

import torch
import typer
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from qadapter.commands import arguments as args
from qadapter.commands import train
from qadapter.commands.loading import loading_options
from qadapter.commands.options import Group, command
from qadapter.console.environment import quiet_libraries
from qadapter.console.terminal import Terminal
from qadapter.data import load_preferences
from qadapter.errors import QAdapterError
from qadapter.planning import (
    Engine,
    Shape,
    Trained,
    lengths_of,
    machine_of,
    outline_of,
    plan_of,
    smallest,
    this_machine,
)
from qadapter.planning.shapes import is_published
from qadapter.system.room import size
from qadapter.training import QAdapterConfig
from qadapter.trunk.base_dtype import dtype_name
from qadapter.trunk.loading import auto_dtype, load_tokenizer

_DATA = ("dataset_name", "dataset_config", "dataset_train_split", "test_fraction", "columns",
         "domain", "rejected_domains", "max_rows")
GROUPS = (
    Group(args.PlanArguments, "Model", ("model_name_or_path", "model_revision", "dtype")),
    Group(args.PlanArguments, "Where", ("gpus",)),
    Group(args.PlanArguments, "Data", _DATA),
    *(group for group in train.GROUPS if group.arguments is QAdapterConfig),
)
_OURS = ("model_name_or_path", "dataset_name", "gpus")
NOTE = "Options are those of qadapter train; the command to start it is printed with them."


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "plan", "Say what a training run needs, without loading the base: memory of each GPU by "
        "part, time, disk, and the command that starts it.",
        GROUPS, run, defaults=train.DEFAULTS, helps=train.HELPS, without=train.WITHOUT, note=NOTE,
        show_hidden=show_hidden,
    )


def run(script: args.PlanArguments, config: QAdapterConfig, given: set[str]) -> None:
    """Print the plan."""
    console = Terminal()
    if script.dataset_name is None:
        raise QAdapterError("plan needs --pairs")
    if not 0 <= script.test_fraction < 1:
        raise QAdapterError(f"test_fraction must be from 0 to below 1, got {script.test_fraction}")
    quiet_libraries()
    machine = None if script.gpus is None else machine_of(script.gpus)
    loading = loading_options(script, config.trust_remote_code, config.model_init_kwargs)
    if "distributed_config" in loading:
        raise QAdapterError(
            "model_init_kwargs: how a base is spread (distributed_config) is what a plan finds: "
            "leave it out"
        )
    base, source = outline_of(
        script.model_name_or_path, revision=loading["revision"],
        trust_remote_code=loading["trust_remote_code"],
    )
    dtype = _dtype(loading["dtype"], base, on_gpus=machine is not None)
    if machine is None:
        machine = this_machine(base.config.get_text_config().hidden_size, dtype.itemsize)
    pairs = load_preferences(
        script.dataset_name, split=script.dataset_train_split, **script.load_kwargs()
    )
    lengths = lengths_of(
        pairs, _tokenizer(script.model_name_or_path, loading), max_length=config.max_length,
        truncation_mode=config.truncation_mode,
    )
    lengths = lengths._replace(pairs=max(1, round(lengths.pairs * (1 - script.test_fraction))))
    plan = plan_of(base, lengths, config, machine, dtype)
    shape, trained, costs, ways = plan
    chosen = plan.chosen

    def say(line: str) -> None:
        console.print(line, highlight=False)

    say(f"base: {script.model_name_or_path} ({source}): {_count(shape.weights)} weights in "
        f"{dtype_name(dtype)}, {shape.depth} blocks")
    say(f"trained: {_described(trained, shape)}, {_count(trained.parameters)} numbers")
    say(f"pairs: {lengths.pairs:,} to train on, of {lengths.tokens:,.0f} tokens, "
        f"{lengths.actions:,.0f} of them in answers ({lengths.counted})")
    console.print(_table(ways, str(machine)))
    total = costs.features * lengths.pairs
    if total:
        say(f"the base's features: {size(total)}, read once and kept (--cache_features: memory of "
            "every process, or disk)")
    say("times are estimates; loading, evaluation and saving are not in them")
    if chosen is None:
        enough = smallest(shape, costs, lengths, config, machine)
        more = f"{enough} would be" if enough else "no number of nodes is"
        raise QAdapterError(
            f"{script.model_name_or_path} can't be trained so on {machine}: a process needs "
            f"{size(min(way.needs for way in ways))}, and has {size(ways[0].room)}; {more} enough. "
            "Less is needed with a smaller per_device_train_batch_size, max_length or lora_layers, "
            "gradient_checkpointing, or a base in 4 bits (model_init_kwargs)"
        )
    say(f"take: {chosen.name}")
    line = _command_line(chosen, script, config, given, machine.nodes)
    console.print(f"\n{line}", highlight=False, soft_wrap=True)  # to be copied in one piece


def _dtype(asked: Any, base: Any, on_gpus: bool) -> torch.dtype:
    if asked == "auto" and not on_gpus:
        asked = auto_dtype(base.config, lambda line: None)
    if isinstance(asked, str) and asked not in ("auto", "checkpoint"):
        return getattr(torch, asked)
    if isinstance(asked, torch.dtype):
        return asked
    return getattr(base.config.get_text_config(), "dtype", None) or torch.float32


def _tokenizer(name: str, loading: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    if is_published(name):
        return None
    try:
        return load_tokenizer(name, revision=loading["revision"],
                              trust_remote_code=loading["trust_remote_code"])
    except QAdapterError:
        return None


def _described(trained: Trained, shape: Shape) -> str:
    if trained.first_block is None:
        return "a head adapter"
    return f"an adapter in {shape.depth - trained.first_block} of {shape.depth} blocks"


def _table(ways: list[Engine], machine: str) -> Table:
    table = Table(title=f"{machine}: a process needs, and how long it takes", title_justify="left")
    table.add_column("")
    for way in ways:
        table.add_column(way.name, justify="right")
    for part in ways[0].parts:
        table.add_row(part, *(size(b) if (b := way.parts[part]) else "—" for way in ways))
    table.add_row("together", *(size(way.needs) for way in ways))
    table.add_row(f"of {size(ways[0].room)}", *("fits" if w.fits else "too much" for w in ways))
    table.add_section()
    table.add_row("the base reads the pairs", *(duration(way.read_seconds) for way in ways))
    table.add_row("a step", *(duration(way.step_seconds) for way in ways))
    table.add_row("which waits for", *(way.bound_by for way in ways))
    if any(way.disk_seconds for way in ways):
        table.add_row("its features off a disk", *(duration(way.disk_seconds) for way in ways))
    table.add_row("steps", *(f"{way.steps:,}" for way in ways))
    table.add_row("in all", *(duration(way.seconds) for way in ways))
    return table


def _command_line(
    way: Engine, script: args.PlanArguments, config: QAdapterConfig, given: set[str], nodes: int
) -> str:
    kwargs = dict(config.model_init_kwargs or {})
    if way.shards > 1:
        kwargs["distributed_config"] = {"fsdp_size": way.shards}
        if way.shards < way.processes:
            kwargs["distributed_config"]["dp_replicate_size"] = way.processes // way.shards
    words = ["qadapter", "train"]
    if way.processes > 1:
        where = ["--nproc_per_node", str(way.processes // nodes)]
        if nodes > 1:
            where = ["--nnodes", str(nodes), *where, "--rdzv_backend", "c10d", "--rdzv_endpoint",
                     "FIRST_NODE:29500"]
        words = ["torchrun", *where, "--no-python", "qadapter", "train"]
    words += ["--model_name_or_path", script.model_name_or_path,
              "--dataset_name", str(script.dataset_name)]
    for name in sorted(given - {*_OURS, "output_dir", "model_init_kwargs"}):
        value = getattr(config if hasattr(config, name) else script, name)
        text = value if isinstance(value, str) else json.dumps(value)
        words += [f"--{name}", text]
    if kwargs:
        words += ["--model_init_kwargs", json.dumps(kwargs)]
    return shlex.join([*words, "--output_dir", config.output_dir])


def duration(seconds: float) -> str:
    """As people read it: ``3.2 ms``, ``45 s``, ``12 min``, ``7.5 h``."""
    for limit, factor, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"),
                                (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def _count(number: float) -> str:
    for limit, factor, unit in ((1e6, 1e3, " thousand"), (1e9, 1e6, " million")):
        if number < limit:
            return f"{number / factor:.3g}{unit}"
    return f"{number / 1e9:.3g} billion"
