"""A customised model that needs nothing of us: plain checkpoints and PEFT adapters.

What is exported is the policy the model is set to, its strength included (design §2, facts 5 and
6). Nothing is kept that was not checked: stock libraries reload every export in a process of their
own, and it gets its name only when they decode the same policy with it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.data.ends import end_of_turn_ids
from qadapter.data.templates import default_of
from qadapter.errors import QAdapterError
from qadapter.exporting import checkpoints
from qadapter.exporting.approximation import Approximation
from qadapter.exporting.card import write_card
from qadapter.exporting.engines import Served
from qadapter.exporting.exporters import Exporter, plan
from qadapter.exporting.forms import FROM_MERGED, Form, require_exportable
from qadapter.exporting.gguf.check import GgufCheck, check_gguf
from qadapter.exporting.gguf.making import (
    make_gguf,
    own_type,
    require_architecture,
    require_options,
    require_tokenizer,
)
from qadapter.exporting.ollama import write_modelfile
from qadapter.exporting.verification import Check, check_export
from qadapter.system import manifest
from qadapter.system.locking import lock_of, remove_stale, sole_run
from qadapter.system.modes import give_usual_modes
from qadapter.system.scratch import remove_abandoned, scratch_folder
from qadapter.trunk.older_names import add_older_names
from qadapter.trunk.sharding import layout_of

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel

@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, and what its check found."""

    form: str
    folder: Path
    temperature: float
    """To sample at for the policy itself; ``generation_config.json`` says it too."""
    tokenizer: bool
    """Whether a tokenizer was written along."""
    check: Check
    approximation: Approximation | None = None
    gguf: GgufCheck | None = None
    """Of a GGUF file: beside the merged checkpoint that ``check`` is of."""
    modelfile: tuple[str, ...] = ()
    """What there is to know of a Modelfile for Ollama."""


def export(
    model: QAdapterModel, output_dir: str | Path, form: Form = "merged", *,
    approximate: bool = False, texts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None, max_shard_size: int | str | None = None,
    gguf_type: str = "auto", llama_cpp_dir: str | Path | None = None,
) -> ExportReport | None:
    """Write the customised policy, at the strength it is set to, for engines that don't know us.

    Args:
        output_dir: a folder that is not there yet, or empty. It appears whole or not at all.
        form: "merged": a checkpoint of the base's own architecture. "lm_head_lora": a head adapter
            as a PEFT LoRA on the output layer. "peft": a LoRA of the trunk as PEFT writes it.
            "gguf": the merged checkpoint as one file for llama.cpp. "ollama": that file with a
            Modelfile beside it.
        approximate: export the linear adapter nearest to one that isn't linear; the card says how
            far the two are apart.
        texts: texts or token ids, like those the model is for. ``approximate`` fits to them, and
            what a GGUF type loses is measured on them.
        tokenizer: default: the base's, where it has one. It is written with the chat template that
            the model was trained with (``model.chat_template``).
        max_shard_size: as in ``save_pretrained``; default: the base's largest shard.
        gguf_type: of a GGUF file's weights: "f32", "f16", "bf16", "q8_0"; "auto": the base's own.
        llama_cpp_dir: llama.cpp's folder, whose converter writes GGUF files of architectures that
            aren't written here. Default: the converter on PATH, where there is one.

    Returns:
        None in all but the first process where the base is sharded: that one loads it once more,
        whole, on its CPU; the others go on.

    Raises:
        QAdapterError: the policy has no exact export of this form (with the reason), the folder is
            not empty or can't be written, a sharded base isn't found by its name, or the check
            failed (with what differs).
    """
    target = Path(output_dir).expanduser().absolute()
    sharded = bool(layout_of(model.base).engine)
    if sharded and dist.get_rank() > 0:
        return None
    require_free(target)
    if sharded:
        model = _on_a_whole_base(model, target.parent)
    require_exportable(
        _described(model), model.policy.stream_weights(), form, approximate=approximate,
        adapters=len(model.adapter.names) if model.adapts_trunk else 1, texts=texts is not None,
    )
    require_options(form, gguf_type, llama_cpp_dir)
    tokenizer, template_chosen = _tokenizer(model, tokenizer)
    ids = None if texts is None else _token_ids(texts, tokenizer)
    as_gguf = None
    if form in FROM_MERGED:
        require_architecture(model.base.config, not model.adapts_trunk, llama_cpp_dir)
        rows = model.base.get_input_embeddings().weight.shape[0]
        require_tokenizer(tokenizer, rows, llama_cpp_dir)
        as_gguf = _AsGguf(
            form, own_type(model.base.dtype) if gguf_type == "auto" else gguf_type, llama_cpp_dir,
            ids or (),
        )
    exporter = plan(
        model, "merged" if form in FROM_MERGED else form, ids if approximate else None
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            sole_run(target, beside=True),
            scratch_folder(target.parent, "exporting") as scratch,
        ):
            report = _write_and_check(
                exporter, scratch, target, tokenizer, template_chosen, max_shard_size, as_gguf
            )
            os.rename(scratch / "export", target)  # onto nothing, or an empty folder
    except (OSError, SafetensorError) as error:
        raise QAdapterError(f"{target}: the export can't be written: {error}") from error
    return report


def _on_a_whole_base(model: QAdapterModel, place: Path) -> QAdapterModel:
    """The same policy in this process alone, on the CPU; nothing of it is a collective."""
    identity = model.base_identity
    if not model.base.config.name_or_path:
        raise QAdapterError(
            "an export needs the whole base, and this one has no name to load it by once more: "
            "save the adapter, and export it in one process"
        )
    try:
        with scratch_folder(place, "exporting") as scratch:
            model.save_pretrained(scratch / "adapter")
            whole = type(model).from_pretrained(
                scratch / "adapter", identity.name, dtype=model.base.dtype,
                revision=identity.revision, device_map="cpu",
            )
    except QAdapterError as error:
        raise QAdapterError(
            f"an export needs the whole base, and {identity.name} can't be loaded once more: "
            f"{error}; save the adapter, and export it in one process"
        ) from error
    whole.policy = model.policy
    return whole


def _tokenizer(
    model: QAdapterModel, given: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase | None, bool]:
    """The tokenizer to write, with the chat template the model was trained with, and whether that
    is another than the base's own."""
    own = checkpoints.tokenizer_of(model.base)
    tokenizer = own if given is None else given
    if tokenizer is None:
        return None, False
    template = default_of(tokenizer.chat_template) if model.chat_template is None else (
        model.chat_template
    )
    if template != default_of(tokenizer.chat_template):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    base_template = None if own is None else default_of(own.chat_template)
    return tokenizer, template is not None and template != base_template


def _described(model: QAdapterModel) -> AdapterConfig | PeftConfig:
    config = model.adapter_config
    return config[0] if isinstance(config, tuple) else config  # of a composition


# --- writing it ---------------------------------------------------------------------------------


def _write_and_check(
    exporter: Exporter, scratch: Path, target: Path,
    tokenizer: PreTrainedTokenizerBase | None, template_chosen: bool,
    max_shard_size: int | str | None, as_gguf: _AsGguf | None,
) -> ExportReport:
    model, form = exporter.model, exporter.form
    generation_config = copy.deepcopy(model.generation_config)
    if template_chosen:  # then the base's settings don't know what ends a turn
        generation_config.eos_token_id = end_of_turn_ids(model, tokenizer)
    temperature = (generation_config.temperature or 1.0) / exporter.logits_factor
    folder = scratch / "export"
    folder.mkdir()
    checked_base = revision = None
    known_to_4 = True
    if form == "merged":
        checkpoint = exporter.checkpoint()
        checkpoints.write_checkpoint(
            checkpoint, folder, generation_config,
            max_shard_size or checkpoints.shard_size_of(model.base),
        )
        known_to_4 = add_older_names(folder, type(checkpoint.config))
        tied = checkpoint.config.get_text_config().tie_word_embeddings
        if tokenizer is not None:
            checkpoints.write_tokenizer(tokenizer, folder)
    else:
        if template_chosen:
            checkpoints.write_tokenizer(tokenizer, folder)
        tokenizer = None  # engines take the base's
        name = checkpoints.public_name_of(model.base)
        exporter.write_peft(folder, name.name, name.revision)
        checkpoints.leave_out_defaults(folder)
        if temperature != 1.0:
            generation_config.temperature = temperature
        generation_config.to_json_file(folder / "generation_config.json")
        checked_base, revision = checkpoints.name_of(model.base)
        checked_base = checked_base or _write_base(model, scratch / "base")
        tied = model.base.config.get_text_config().tie_word_embeddings
    check = check_export(
        folder, scratch, model, exporter.reference, base=checked_base, revision=revision,
        logits_factor=exporter.logits_factor, temperature=temperature, tokenizer=tokenizer,
    )
    gguf, modelfile = None, ()
    if as_gguf is not None:
        form = as_gguf.form
        checkpoint_folder = folder.rename(scratch / "checkpoint")
        folder.mkdir()
        gguf, modelfile = as_gguf.write(
            checkpoint_folder, folder, target.name, scratch, tokenizer, temperature
        )
    give_usual_modes(folder)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    write_card(
        folder, model, _served(exporter, form, target.name, temperature, tied), check,
        tokenizer=tokenizer is not None, approximation=exporter.approximation,
        transformers_4=known_to_4, gguf=gguf, modelfile=modelfile,
    )
    manifest.write(folder, files)  # not the card: it is for people, who may write on
    return ExportReport(
        form, target, temperature, tokenizer is not None, check, exporter.approximation, gguf,
        modelfile,
    )


def _served(
    exporter: Exporter, form: str, folder: str, temperature: float, tied: bool
) -> Served:
    model = exporter.model
    config = model.base.config.get_text_config()
    base = checkpoints.public_name_of(model.base)
    return Served(
        form, folder, base=base.name or model.base_identity.name,
        base_is_folder=not base.on_hub,
        rank=exporter.rank, temperature=temperature, tied=bool(tied),
        model_type=config.model_type, vocab_size=config.vocab_size,
        dtype=str(model.base.dtype).removeprefix("torch."), beyond_lora=exporter.beyond_lora,
    )


@dataclasses.dataclass(frozen=True)
class _AsGguf:
    """A merged checkpoint as a GGUF file."""

    form: str
    kind: str
    llama_cpp_dir: str | Path | None
    texts: Sequence[Sequence[int]]

    def write(
        self, checkpoint: Path, folder: Path, name: str, scratch: Path,
        tokenizer: PreTrainedTokenizerBase, temperature: float,
    ) -> tuple[GgufCheck, tuple[str, ...]]:
        """What the file's check found, and what there is to know of a Modelfile."""
        ends = GenerationConfig.from_pretrained(checkpoint).eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        file = folder / f"{name}.gguf"
        make_gguf(checkpoint, file, self.kind, name, ends, self.llama_cpp_dir)
        check = check_gguf(file, checkpoint, scratch, self.kind, tokenizer, self.texts)
        if self.form != "ollama":
            return check, ()
        return check, write_modelfile(folder, file.name, tokenizer, ends, temperature)


def _write_base(model: QAdapterModel, folder: Path) -> str:
    """A base that is in memory only, as a folder that stock libraries load."""
    model.bare_base().save_pretrained(folder)
    return str(folder)


def _token_ids(
    texts: Sequence[str] | Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None
) -> Sequence[Sequence[int]]:
    if not any(isinstance(text, str) for text in texts):
        return texts
    if tokenizer is None:
        raise QAdapterError("texts given as strings need a tokenizer")
    return tokenizer(list(texts), verbose=False)["input_ids"]


def require_free(folder: Path) -> None:
    """Raises QAdapterError for a place that is taken. What killed exports left beside it goes."""
    remove_abandoned(folder.parent)  # a model's size, each
    remove_stale(lock_of(folder, beside=True))
    if os.path.lexists(folder) and not folder.is_dir():
        raise QAdapterError(f"output_dir {folder} is a file, or a link to none")
    if folder.is_dir() and any(folder.iterdir()):
        raise QAdapterError(f"output_dir {folder} is not empty: choose another")
