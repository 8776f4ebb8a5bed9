"""The command line's root. Light: what a command needs is imported when it runs."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import traceback
import warnings
from typing import Annotated

import typer

from qadapter import __version__
from qadapter.console.early import INTERRUPTED, TERMINATED, LeavingAtOnce
from qadapter.console.signals import Terminated, raising
from qadapter.errors import QAdapterError
from qadapter.system.markup import one_line
from qadapter.system.textfiles import is_unicode

USER_ERROR = 2
# A command's own options need heavy imports: they are parsed by the command's own app.
_PASS_ON = {
    "allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": [],
}

app = typer.Typer(
    name="qadapter", add_completion=False, rich_markup_mode="rich",
    help="Customise a frozen language model to new preferences without making it forget.",
    epilog="qadapter COMMAND --help shows a command's options.",
)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        typer.echo(f"qadapter {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
    else:
        return
    raise typer.Exit


def _hand_over(module: str, ctx: typer.Context) -> None:
    arguments = list(ctx.args)
    show_all = [a for a in arguments if a.replace("-", "_") == "__help_all"]
    if show_all:
        arguments = ["--help"]
    with LeavingAtOnce():
        build = importlib.import_module(f"qadapter.commands.{module}").app
    command = typer.main.get_command(build(show_hidden=bool(show_all)))
    name = f"qadapter {ctx.command.name}"
    result = command.main(args=arguments, prog_name=name, standalone_mode=False)
    if isinstance(result, int):  # typer returns the code of an Exit, as of an interrupt
        raise typer.Exit(result)


@app.command(context_settings=_PASS_ON)
def demo(ctx: typer.Context) -> None:
    """Customise a small real chat model to built-in preferences, in minutes."""
    _hand_over("demo", ctx)


@app.command(context_settings=_PASS_ON)
def train(ctx: typer.Context) -> None:
    """Customise a base model to preference pairs."""
    _hand_over("train", ctx)


@app.command(context_settings=_PASS_ON)
def plan(ctx: typer.Context) -> None:
    """Say what a training run needs: memory by part, time, disk, and how to start it."""
    _hand_over("plan", ctx)


@app.command("eval", context_settings=_PASS_ON)
def evaluate(ctx: typer.Context) -> None:
    """Measure preferences, retention and answers of a model."""
    _hand_over("evaluate", ctx)


@app.command(context_settings=_PASS_ON)
def compare(ctx: typer.Context) -> None:
    """Compare methods on the same pairs under equal budgets, over seeds."""
    _hand_over("compare", ctx)


@app.command(context_settings=_PASS_ON)
def judge(ctx: typer.Context) -> None:
    """Let judges say how often a model's answers beat its base's."""
    _hand_over("judge", ctx)


@app.command(context_settings=_PASS_ON)
def generate(ctx: typer.Context) -> None:
    """Answer prompts, or chat."""
    _hand_over("generate", ctx)


@app.command(context_settings=_PASS_ON)
def serve(ctx: typer.Context) -> None:
    """Serve adapters and their base with OpenAI's API, a strength a request, and a page."""
    _hand_over("serve", ctx)


@app.command(context_settings=_PASS_ON)
def export(ctx: typer.Context) -> None:
    """Write an adapter as a plain checkpoint or a PEFT adapter, and check it."""
    _hand_over("export", ctx)


@app.command(context_settings=_PASS_ON)
def rewards(ctx: typer.Context) -> None:
    """Show what an adapter rewards, token by token, as a page."""
    _hand_over("rewards", ctx)


@app.command(context_settings=_PASS_ON)
def bench(ctx: typer.Context) -> None:
    """Measure the kernels beside their peers (needs a checkout of the repository)."""
    _hand_over("bench", ctx)


@app.command()
def info() -> None:
    """Show versions, devices, base models at hand, and which kernels are taken and why."""
    importlib.import_module("qadapter.commands.info").run()


def run(arguments: list[str]) -> int:
    """Run a command; the process's exit code."""
    # PEFT imports bitsandbytes wherever it is installed, and that warns of a kernel on a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL tells the hub of its trainers; who works on local files tells nobody, unless they say so.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # What a library will rename one day concerns who writes code, not who runs a command.
    warnings.simplefilter("ignore", FutureWarning)
    debug = "--debug" in itertools.takewhile(lambda a: a.startswith("-"), arguments)
    came: list[int] = []
    try:
        for argument in arguments:
            # Tokenizers and Arrow refuse such a name, some of them hours later.
            if not is_unicode(argument):
                raise QAdapterError(f"{argument} is not UTF-8 text: rename the file or folder")
        command = typer.main.get_command(app)
        with raising() as came:
            result = command.main(args=arguments, prog_name="qadapter", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        return _stopped(code) if code == INTERRUPTED else code
    except Terminated as stop:
        return _stopped(TERMINATED, *stop.args)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if came:
            return _stopped(128 + came[-1])
        if not isinstance(error, QAdapterError | typer.TyperException | OSError):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _stopped(code: int, *how_to_go_on: str) -> int:
    word = "interrupted" if code == INTERRUPTED else "terminated"
    print(one_line(": ".join((f"error: {word}", *how_to_go_on))), file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return one_line(f"{where}{error.strerror}")
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    return one_line(text)

