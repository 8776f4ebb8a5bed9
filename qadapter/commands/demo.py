"""``qadapter demo``: the whole job on a small real model, in minutes."""

from __future__ import annotations

import typer

from qadapter.commands.arguments import DemoArguments
from qadapter.commands.options import Group, command


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "demo",
        "Customise a real 135M-parameter chat model to built-in preferences, on a CPU, in minutes.",
        (Group(DemoArguments, "Demo"),), run, show_hidden=show_hidden,
    )


def run(options: DemoArguments, given: set[str]) -> None:
    from qadapter.demo import run_demo

    run_demo(
        output_dir=options.output_dir, fast=options.fast,
        model_name_or_path=options.model_name_or_path, seed=options.seed,
    )
