"""``qadapter serve``: adapters and their base behind OpenAI's API, with a page."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import typer
from transformers import PreTrainedTokenizerBase

from qadapter.commands import arguments as args
from qadapter.commands.loading import (
    loading_options,
    name_of_base,
    require_one_process,
    say_base,
    settle_template,
)
from qadapter.commands.options import Group, command
from qadapter.console.environment import quiet_libraries
from qadapter.console.progress import progress_bar, saying
from qadapter.console.terminal import Terminal
from qadapter.errors import QAdapterError
from qadapter.policy import storage
from qadapter.trunk.loading import load_base, load_tokenizer

_INSTALL = "pip install 'qadapter[serve]'"


@dataclass
class ServeArguments:
    """What is served, where, and how much of it at once."""

    adapters: list[str] | None = field(default=None, metadata={
        "help": "What qadapter train wrote, several times for several adapters on one base; "
        "requests name them by the last part of their paths."
    })
    host: str = field(default="127.0.0.1", metadata={
        "help": "Where to listen; any other than this machine's own needs --api_key_file."
    })
    port: int = field(default=8000, metadata={"help": "0 takes a free one."})
    api_key_file: str | None = field(default=None, metadata={
        "help": "File with the key that requests must carry: Authorization: Bearer …"
    })
    preferences_file: str | None = field(default=None, metadata={
        "help": "JSON Lines file to which the page's pairs are added, as qadapter train reads it."
    })
    max_length: int = field(default=4096, metadata={
        "help": "Most tokens of a prompt and its answer; never more than the base has positions."
    })
    max_concurrency: int = field(default=32, metadata={
        "help": "Most answers written at once; more are refused with status 429."
    })
    max_body_bytes: int = field(default=2**20, metadata={"help": "Most bytes of a request."})
    grace_seconds: float = field(default=30.0, metadata={
        "help": "How long answers may go on after SIGTERM or Ctrl-C."
    })

    def __post_init__(self) -> None:
        for name, most in (("max_length", 2**24), ("max_concurrency", 1024),
                           ("max_body_bytes", 2**30)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise QAdapterError(f"{name} must lie between 1 and {most:,}, got {value}")
        if not 0 <= self.port < 2**16:
            raise QAdapterError(f"port must lie between 0 and 65,535, got {self.port}")
        args.require_not_negative("grace_seconds", self.grace_seconds)


GROUPS = (
    Group(ServeArguments, "Models", ("adapters",)),
    Group(args.AdapterArguments, "Models", (
        "base_model_name_or_path", "strength", "model_revision", "dtype", "trust_remote_code",
        "model_init_kwargs", "chat_template_path",
    )),
    Group(ServeArguments, "Server", ("host", "port", "api_key_file", "preferences_file")),
    Group(ServeArguments, "Limits"),
)


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "serve",
        "Serve adapters and their base with OpenAI's API, a strength for each request, and a page.",
        GROUPS, run, show_hidden=show_hidden, argument="adapters",
        helps={"strength": "Dial of the policy where a request says nothing; 1 by default."},
    )


def run(options: ServeArguments, model_args: args.AdapterArguments, given: set[str]) -> None:
    """Check everything that is quick to check, load, serve."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise QAdapterError(f"serve needs {error.name}: {_INSTALL}") from error
    from qadapter.serving import engine, guard, models, server
    from qadapter.serving.app import Service
    from qadapter.serving.preferences import PreferenceFile
    from qadapter.serving.requests import MAX_STRENGTH

    console = Terminal(stderr=True)
    if not options.adapters:
        raise QAdapterError("serve needs an adapter: qadapter serve runs/mine")
    strength = 1.0 if model_args.strength is None else model_args.strength
    if strength > MAX_STRENGTH:
        raise QAdapterError(f"strength must be at most {MAX_STRENGTH:g}, got {strength:g}")
    key = None if options.api_key_file is None else guard.read_key(options.api_key_file)
    if key is None and not guard.is_loopback(options.host):
        raise QAdapterError(
            f"{options.host} can be reached from elsewhere: give --api_key_file, or stay on "
            "127.0.0.1"
        )
    engine.require_batching()
    preferences = None
    if options.preferences_file is not None:
        preferences = PreferenceFile(options.preferences_file)
    listening = server.listen(options.host, options.port)
    quiet_libraries()
    loading = loading_options(
        model_args, model_args.trust_remote_code, model_args.model_init_kwargs
    ) | {"say": saying(console)}
    require_one_process(loading)
    folders = options.adapters
    first = storage.read(folders[0])
    base = name_of_base(folders[0], first, model_args.base_model_name_or_path)
    base = say_base(base, console)
    names, base_name = models.names_of(folders, base)
    tokenizers = _tokenizers(dict(zip(names, folders, strict=True)), base, base_name, model_args,
                             loading, console)
    with progress_bar(console, "loading the base", "", closing=False):
        loaded = load_base(base, **loading)
        served = models.load(
            dict(zip(names, folders, strict=True)), base_name, loaded, tokenizers, strength
        )
    length = models.fitting_length(served, options.max_length)
    service = Service(
        engine.Engine(served, length, options.max_concurrency), served, options.host, key,
        preferences, options.max_body_bytes,
    )

    def ready() -> None:
        console.print(
            f"serving {', '.join(names)} and the base {base_name}, {length:,} tokens an answer "
            f"with its prompt, {options.max_concurrency} at once", highlight=False, markup=False,
        )
        console.print(
            f"at {server.address_of(listening, options.host)} (the page; OpenAI's API at v1/)",
            highlight=False, markup=False,
        )

    server.run(service, listening, options.grace_seconds, ready)


def _tokenizers(
    adapters: dict[str, str], base: str, base_name: str, arguments: args.AdapterArguments,
    loading: dict[str, Any], console: Terminal,
) -> dict[str, PreTrainedTokenizerBase]:
    """One for each model, with its own chat template. A base without one is asked as its first
    adapter is."""
    bare = load_tokenizer(
        base, revision=loading["revision"], trust_remote_code=loading["trust_remote_code"]
    )
    found = {}
    for name, folder in adapters.items():
        found[name] = copy.deepcopy(bare)
        settle_template(found[name], arguments.chat_template_path, folder, console)
    first = next(iter(found.values()))
    if arguments.chat_template_path is not None or not bare.chat_template:
        return {**found, base_name: first}
    return {**found, base_name: bare}
