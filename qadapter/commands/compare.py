"""``qadapter compare``: several methods on the same pairs under equal budgets."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import typer
from rich.table import Table

from qadapter.commands.options import Group, command
from qadapter.compare import Comparison, read_config, read_results, run_comparison, write_report
from qadapter.compare.config import SPLITS
from qadapter.compare.page import columns, judges_left_out
from qadapter.console.environment import devices, quiet_libraries, versions
from qadapter.console.folders import telling_how_to_go_on
from qadapter.console.progress import Heartbeat, Pace
from qadapter.console.terminal import Terminal
from qadapter.errors import QAdapterError, shown

AGAIN = "run it again: what is finished is kept"
_SHOWN = ("accuracy_reward", "new_win_rate", "old_win_rate", "new_gain")


@dataclass
class CompareArguments:
    """What to compare, and where to."""

    comparison: str | None = field(default=None, metadata={
        "help": "The comparison: a YAML file (docs/compare.md says what it holds)."
    })
    output_dir: str | None = field(default=None, metadata={
        "help": "Results folder; a comparison in it that was broken off is continued."
    })
    split: str = field(default="validation", metadata={
        "help": "Held-out prompts to measure on: validation, to choose by; or test, to report, "
        "which is recorded.", "choices": list(SPLITS),
    })
    only: list[str] | None = field(default=None, metadata={
        "help": "Rows to run, as [DPO, SFT]; default: all. For several processes on one "
        "comparison: start the first alone, the others when the base is measured."
    })
    report_only: bool = field(default=False, metadata={
        "help": "Write the report of what is finished, and run nothing."
    })


GROUPS = (Group(CompareArguments, "Comparison"),)


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "compare",
        "Train SFT, DPO, replay, RLOO and Q-Adapter on the same pairs under equal budgets, over "
        "seeds; measure what each learned and forgot; write one report.",
        GROUPS, run, show_hidden=show_hidden, argument="comparison",
    )


def run(arguments: CompareArguments, given: set[str]) -> None:
    """Run what is missing, write the report, show the table."""
    console = Terminal()
    for name in ("comparison", "output_dir"):
        if name not in given:
            raise QAdapterError(f"compare needs --{name}")
    only = [arguments.only] if isinstance(arguments.only, str) else arguments.only
    if only is not None and not (isinstance(only, list) and all(isinstance(x, str) for x in only)):
        raise QAdapterError(f"only must read [name, …], got {shown(only)}")
    if only == [] or only == [""]:
        raise QAdapterError("only names no row")
    quiet_libraries()
    config = read_config(arguments.comparison)
    start = time.monotonic()
    step = Pace("reading", "")

    def show(line: str) -> None:
        console.print(f"{time.monotonic() - start:6.0f} s  {line}", highlight=False, markup=False)

    # A step may take long: it is named again.
    heartbeat = Heartbeat(lambda: step.line(), show)

    def say(line: str) -> None:
        nonlocal step
        step = Pace(line, "")
        heartbeat.said()
        show(line)

    with telling_how_to_go_on(arguments.output_dir, AGAIN), heartbeat:
        if not arguments.report_only:
            run_comparison(
                config, arguments.output_dir, split=arguments.split, only=only, say=say,
                environment={"versions": versions(), "devices": devices()},
            )
        found = read_results(config, arguments.output_dir, arguments.split)
        page = write_report(found, arguments.output_dir)
    console.print(_table(found))
    if note := judges_left_out(found):
        console.print(note, highlight=False, markup=False)
    console.print(f"wrote {page}", highlight=False)


def _table(comparison: Comparison) -> Table:
    """The few columns a terminal has room for."""
    shown = [c for c in columns(comparison) if c.key in _SHOWN or c.key.startswith("kl:")]
    table = Table(title=f"{comparison.title}, {comparison.split} split", title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in shown:
        table.add_column(column.label, justify="right")
    for result in comparison.results:
        cells = []
        for column in shown:
            found = result.number(column.measure)
            text = "—" if found is None else f"{found.mean:.{column.digits}f}"
            cells.append(text + (f" ± {found.sd:.{column.digits}f}" if found and found.sd else ""))
        table.add_row(result.row.name, *cells)
    return table
