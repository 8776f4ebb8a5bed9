"""``qadapter export``: an adapter as files that other engines serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.table import Table

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.commands import arguments as args
from qadapter.commands.loading import is_adapter, load_model, name_of_base
from qadapter.commands.options import Group, command
from qadapter.console.environment import quiet_libraries
from qadapter.console.folders import telling_how_to_go_on
from qadapter.console.terminal import Terminal
from qadapter.data import read_texts
from qadapter.errors import QAdapterError
from qadapter.exporting.export import ExportReport, export, require_free
from qadapter.exporting.forms import FORMS, FROM_MERGED, ON_THE_COMMAND_LINE, require_exportable
from qadapter.exporting.gguf import telling
from qadapter.exporting.gguf.making import TYPES, require_architecture, require_options
from qadapter.policy import storage
from qadapter.policy.dial import Policy
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.loading import base_without_weights


@dataclass
class ExportArguments:
    """What to write, and where."""

    form: str = field(default="merged", metadata={
        "help": "merged: a checkpoint of the base's own architecture; lm_head_lora: a PEFT LoRA on "
        "the output layer; peft: a LoRA of the trunk as PEFT writes it; gguf: the merged "
        "checkpoint as one file for llama.cpp; ollama: that file and Ollama's Modelfile.",
        "choices": list(FORMS),
    })
    output_dir: str | None = field(default=None, metadata={
        "help": "Folder of the export; it must not be there yet, or be empty."
    })
    approximate: bool = field(default=False, metadata={
        "help": "An adapter that is not linear: export the linear one nearest to it, and say how "
        "far the two are apart."
    })
    texts_file: str | None = field(default=None, metadata={
        "help": "Texts that --approximate fits to, and that what a --gguf_type loses is measured "
        "on, .txt (one a line) or .jsonl (key: text): such as the model is for."
    })
    max_shard_size: str | None = field(default=None, metadata={
        "help": "Largest weight file, as 5GB; default: the base's largest."
    })
    gguf_type: str = field(default="auto", metadata={
        "help": "Type of a GGUF file's weights; auto: the base's own, which loses nothing.",
        "choices": ["auto", *TYPES],
    })
    llama_cpp_dir: str | None = field(default=None, metadata={
        "help": "llama.cpp's folder: its converter writes GGUF files of architectures that aren't "
        "written here. Default: the converter on PATH."
    })


GROUPS = (
    Group(args.AdapterArguments, "Model", (
        "model_name_or_path", "base_model_name_or_path", "strength", "model_revision", "dtype",
        "trust_remote_code", "model_init_kwargs", "chat_template_path",
    )),
    Group(ExportArguments, "Export"),
)
HELPS = {"dtype": "Data type of what is written; auto takes the base's checkpoint's."}


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "export",
        "Write an adapter as a plain checkpoint or a PEFT adapter that other engines serve. Every "
        "export is reloaded by stock transformers or PEFT in a process of its own and must decode "
        "the same policy.",
        GROUPS, run, helps=HELPS, show_hidden=show_hidden, argument="model_name_or_path",
    )


def run(model_args: args.AdapterArguments, options: ExportArguments, given: set[str]) -> None:
    """Export, print what the check found."""
    console = Terminal()
    for name in ("model_name_or_path", "output_dir"):
        if name not in given:
            raise QAdapterError(f"export needs --{name}")
    _check_before_loading(model_args, options)
    texts = None if options.texts_file is None else read_texts(options.texts_file)
    quiet_libraries()
    if model_args.dtype == "auto":
        model_args.dtype = "checkpoint"  # what is written is for other machines
    model, tokenizer = load_model(model_args, console)
    if not isinstance(model, QAdapterModel):
        raise QAdapterError(f"{model_args.model_name_or_path} is a plain model already")
    console.print("exporting, then decoding with stock libraries in another process …")
    with telling_how_to_go_on(options.output_dir, "export again"):
        report = export(
            model, options.output_dir, options.form, approximate=options.approximate,
            texts=None if texts is None else tokenizer(texts, verbose=False)["input_ids"],
            max_shard_size=options.max_shard_size, gguf_type=options.gguf_type,
            llama_cpp_dir=options.llama_cpp_dir,
        )
    console.print(_table(report))
    for line in report.modelfile:
        console.print(line, markup=False)
    console.print(f"wrote {Path(options.output_dir)}", highlight=False)


def _check_before_loading(model_args: args.AdapterArguments, options: ExportArguments) -> None:
    """What the adapter's files tell, before its base is there; raises QAdapterError."""
    name = model_args.model_name_or_path
    require_free(Path(options.output_dir).expanduser().absolute())
    if not is_adapter(name):
        if Path(name).expanduser().is_dir():
            raise QAdapterError(f"{name} is a plain model already")
        return
    saved = storage.read(name)
    adapter, adapters = saved.adapter, 1
    if isinstance(adapter, storage.Composition):
        adapters = len(adapter.folders)
        adapter = storage.read(adapter.folders[0]).adapter
    try:
        policy = Policy(saved.objective, 1.0 if (s := model_args.strength) is None else s)
    except ValueError as error:
        raise QAdapterError(str(error)) from error
    require_exportable(
        adapter, policy.stream_weights(), options.form, adapters=adapters,
        approximate=options.approximate, texts=options.texts_file is not None,
        words=ON_THE_COMMAND_LINE,
    )
    require_options(options.form, options.gguf_type, options.llama_cpp_dir)
    if options.form in FROM_MERGED:
        base = base_without_weights(
            name_of_base(name, saved, model_args.base_model_name_or_path),
            revision=model_args.model_revision, trust_remote_code=model_args.trust_remote_code,
        )
        if base is not None:
            own_head = isinstance(adapter, AdapterConfig)
            require_architecture(base.config, own_head, options.llama_cpp_dir)


def _table(report: ExportReport) -> Table:
    check, found = report.check, report.approximation
    table = Table(title=f"{report.form}, in {check.dtype}", title_justify="left")
    table.add_column("check in stock libraries")
    table.add_column("", justify="right")
    rows = {
        "tokens that are the policy's most likely": f"{check.top_tokens} of {check.tokens}",
        "answers equal to ours": f"{check.same_answers} of {check.prompts}",
        "largest difference of a logit": f"{check.max_logit_error:.3g}",
        "the same, over what rounding may explain": f"{check.error_to_tolerance:.3g}",
        "KL(policy ‖ export) [nats a token]": f"{check.kl_per_token:.3g}",
        "temperature that samples the policy": f"{report.temperature:.6g}",
    }
    if found is not None:
        rows |= {
            "KL(trained policy ‖ this approximation)": f"{found.kl_policy_export:.3g}",
            "KL(trained policy ‖ base)": f"{found.kl_policy_base:.3g}",
            "same most likely token as trained": f"{found.top1_agreement:.4f}",
        }
    if report.gguf is not None:
        rows |= telling.rows(report.gguf)
    for row in rows.items():
        table.add_row(*row)
    return table
