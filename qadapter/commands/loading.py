"""What several commands do first: find a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter import storage
from qadapter.base import load_base, load_tokenizer, resolve_base
from qadapter.commands.arguments import AdapterArguments
from qadapter.data import Prompt, PromptEncoder, set_chat_template, use_chat_template
from qadapter.data.templates import default_of
from qadapter.errors import QAdapterError
from qadapter.model import QAdapterModel


def say_base(name: str, console: Console) -> str:
    """Resolve a base, say which was taken and why; returns the name that resolves the same."""
    found = resolve_base(name, console.print)
    console.print(f"base: {found.name} ({found.reason})", highlight=False, markup=False)
    return found.name


def saying(console: Console) -> Callable[[str], None]:
    """Prints the lines that loading has to tell."""
    return functools.partial(console.print, highlight=False, markup=False)


def load_model(
    arguments: AdapterArguments, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An adapter on its base, at the strength asked for; or a plain causal LM; and the tokenizer.

    Raises:
        QAdapterError: nothing there, damaged, or an adapter and a base that don't match.
    """
    options: dict[str, Any] = {
        "dtype": arguments.dtype, "revision": arguments.model_revision,
        "trust_remote_code": arguments.trust_remote_code, "say": saying(console),
    }
    name = arguments.model_name_or_path
    if not _is_adapter(name):
        for option in ("base_model_name_or_path", "strength"):
            if getattr(arguments, option) is not None:
                raise QAdapterError(f"{option} is for adapters, and {name} is none "
                                    f"({storage.CONFIG_NAME} is missing)")
        base_name = say_base(name, console)
        tokenizer = _tokenizer(base_name, arguments, None, console)
        model: PreTrainedModel = load_base(base_name, **options).model
    else:
        base_name = arguments.base_model_name_or_path or storage.read(name).base.name
        base_name = say_base(base_name, console)
        tokenizer = _tokenizer(base_name, arguments, name, console)
        model = QAdapterModel.from_pretrained(name, base_name, **options)
        if arguments.strength is not None:
            try:
                model.set_policy(strength=arguments.strength)
            except ValueError as error:
                raise QAdapterError(str(error)) from error
        if arguments.chat_template_path is not None:
            model.chat_template = default_of(tokenizer.chat_template)
    return model, tokenizer


def say_left_out(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], console: Console
) -> None:
    """Say what the chat template leaves out of prompts."""
    encoder = PromptEncoder(tokenizer)
    lost = [found for prompt in prompts if (found := encoder.lost(prompt))]
    if lost:
        what = sorted({part.what for found in lost for part in found})
        saying(console)(
            f"the chat template leaves something out of {len(lost):,} of {len(prompts):,} prompts: "
            f"{', '.join(what)}"
        )


def settle_template(
    tokenizer: PreTrainedTokenizerBase, named: str | None, adapter: str | Path | None,
    console: Console,
) -> None:
    """Give a tokenizer the chat template that was named, or else the one that an adapter was
    trained with, and say so.

    Raises:
        QAdapterError: no such template, or not one.
    """
    line = ""
    if named is not None:
        line = use_chat_template(tokenizer, named)
    elif adapter is not None and (saved := storage.read_chat_template(adapter)) is not None:
        line = set_chat_template(tokenizer, saved, f"that of {adapter}")
    if line:
        saying(console)(line)


def _tokenizer(
    base_name: str, arguments: AdapterArguments, adapter: str | None, console: Console
) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(
        base_name, revision=arguments.model_revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    settle_template(tokenizer, arguments.chat_template_path, adapter, console)
    return tokenizer


def _is_adapter(name: str) -> bool:
    folder = Path(name).expanduser()
    if folder.is_dir():
        # A folder with neither file is reported as an adapter that is not whole.
        return (folder / storage.CONFIG_NAME).exists() or not (folder / "config.json").exists()
    if name.count("/") != 1 or folder.is_absolute():
        return False
    try:
        storage.read(name)
    except QAdapterError:
        return False
    return True
