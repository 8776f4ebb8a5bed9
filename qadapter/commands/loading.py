"""What several commands do first: find a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.adapters.planning import require_room
from qadapter.commands.arguments import AdapterArguments, ModelArguments
from qadapter.console.progress import progress_bar, saying
from qadapter.data import (
    Prompt,
    PromptEncoder,
    check_pairs,
    set_chat_template,
    use_chat_template,
)
from qadapter.data.templates import default_of
from qadapter.errors import QAdapterError, shown
from qadapter.policy import storage
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.distributed_config import require_whole_matrices_of
from qadapter.trunk.loading import base_without_weights, load_base, load_tokenizer, resolve_base


def say_base(name: str, console: Console) -> str:
    """Resolve a base, say which was taken and why; returns the name that resolves the same."""
    found = resolve_base(name, console.print)
    console.print(f"base: {found.name} ({found.reason})", highlight=False, markup=False)
    return found.name


def loading_options(
    arguments: ModelArguments, trust_remote_code: bool, kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """Keyword arguments of ``load_base``: flags and ``model_init_kwargs`` together.

    Raises:
        QAdapterError: no mapping, or one thing given both ways.
    """
    if kwargs is not None and not isinstance(kwargs, dict):
        raise QAdapterError(
            f"model_init_kwargs must read {{device_map: auto, …}}, got {shown(kwargs)}"
        )
    kwargs = dict(kwargs or {})
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    flags = {
        "dtype": (arguments.dtype, "auto", "dtype"),
        "revision": (arguments.model_revision, None, "model_revision"),
        "trust_remote_code": (trust_remote_code, False, "trust_remote_code"),
    }
    for name, (value, default, option) in flags.items():
        if name in kwargs and value != default and value != kwargs[name]:
            raise QAdapterError(
                f"model_init_kwargs gives {name} {kwargs[name]}, and {option} says {value}: give "
                "one of them"
            )
        kwargs.setdefault(name, value)
    return kwargs


def require_one_process(options: dict[str, Any]) -> None:
    """Raises QAdapterError where a base would be spread over processes: only training's are many.
    """
    for name in ("distributed_config", "tp_plan", "tp_size"):
        if options.get(name) is not None:
            raise QAdapterError(
                f"model_init_kwargs: {name} is for qadapter train; this command runs in one "
                "process: device_map: auto spreads a base over all GPUs that it sees"
            )


def check_without_weights(
    base_name: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase,
    adapter: Callable[[PreTrainedModel], AdapterConfig | PeftConfig] | None = None,
    **datasets: Dataset | None,
) -> None:
    """What a base's configuration alone can tell, seconds before its weights are there.

    Args:
        options: of ``loading_options``.
        adapter: what will be trained on it, told from its modules.
        datasets: name → tokenized pairs.

    Raises:
        QAdapterError: no such base, no causal LM, a layer that is not there for the adapter, or a
            token that it does not know.
    """
    shell = base_without_weights(
        base_name, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
    )
    if shell is None:
        return
    for name, dataset in datasets.items():
        if dataset is not None:
            check_pairs(dataset, shell, tokenizer, f"the {name} data")
    config = None if adapter is None else adapter(shell)
    if config is not None and not isinstance(config, AdapterConfig):
        require_whole_matrices_of(options.get("distributed_config"), "an adapter of PEFT's")
    if config is not None:
        require_room(shell, config)


def load_model(
    arguments: AdapterArguments, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An adapter on its base, at the strength asked for; or a plain causal LM; and the tokenizer.

    Raises:
        QAdapterError: nothing there, damaged, or an adapter and a base that don't match.
    """
    options = loading_options(
        arguments, arguments.trust_remote_code, arguments.model_init_kwargs
    ) | {"say": saying(console)}
    require_one_process(options)
    name = arguments.model_name_or_path
    if not is_adapter(name):
        for option in ("base_model_name_or_path", "strength"):
            if getattr(arguments, option) is not None:
                raise QAdapterError(f"{option} is for adapters, and {name} is none "
                                    f"({storage.CONFIG_NAME} is missing)")
        base_name = say_base(name, console)
        tokenizer = _tokenizer(base_name, arguments, options, None, console)
        with progress_bar(console, "loading the base", "", closing=False):
            model: PreTrainedModel = load_base(base_name, **options).model
    else:
        saved = storage.read(name)
        base_name = say_base(name_of_base(name, saved, arguments.base_model_name_or_path), console)
        if saved.base is None:
            saying(console)(f"{name} is a PEFT adapter of the authors' code: {saved.objective}")
        tokenizer = _tokenizer(base_name, arguments, options, name, console)
        with progress_bar(console, "loading the base", "", closing=False):
            model = QAdapterModel.from_pretrained(name, base_name, **options)
        if arguments.strength is not None:
            try:
                model.set_policy(strength=arguments.strength)
            except ValueError as error:
                raise QAdapterError(str(error)) from error
        if arguments.chat_template_path is not None:
            model.chat_template = default_of(tokenizer.chat_template)
    return model, tokenizer


def name_of_base(adapter: str, saved: storage.SavedAdapter, given: str | None) -> str:
    """The base that was given for an adapter, or else the one that it names.

    Raises:
        QAdapterError: it names none.
    """
    found = given or saved.base_name
    if found is None:
        raise QAdapterError(f"{adapter} names no base: give --base_model_name_or_path")
    return found


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
    base_name: str, arguments: AdapterArguments, options: dict[str, Any], adapter: str | None,
    console: Console,
) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(
        base_name, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
    )
    settle_template(tokenizer, arguments.chat_template_path, adapter, console)
    return tokenizer


def is_adapter(name: str) -> bool:
    """Whether a name is an adapter's, or a folder's that should be one."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        # A folder with neither file is reported as an adapter that is not whole.
        return (folder / storage.CONFIG_NAME).exists() or not (folder / "config.json").exists()
    if name.count("/") != 1 or folder.is_absolute():
        return False
    return storage.AdapterFiles(name).has(storage.CONFIG_NAME)
