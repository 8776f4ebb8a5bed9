"""A customised model that needs nothing of us: plain checkpoints and PEFT adapters.

What is exported is the policy the model is set to, its strength included (design §2, facts 5 and
6). Nothing is kept that was not checked: stock libraries reload every export in a process of their
own, and it gets its name only when they decode the same policy with it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qadapter.adapters.head_adapter import HeadAdapter, LinearHeadAdapter
from qadapter.data.templates import default_of
from qadapter.errors import QAdapterError
from qadapter.evaluation.answers import end_of_turn_ids
from qadapter.exporting import checkpoints
from qadapter.exporting.approximation import Approximation, fit_linear
from qadapter.exporting.block import BlockExport, plan_block
from qadapter.exporting.card import write_card
from qadapter.exporting.gguf.check import GgufCheck, check_gguf
from qadapter.exporting.gguf.making import TYPES, check_possible, make_gguf, own_type
from qadapter.exporting.head import LinearPolicy
from qadapter.exporting.trunk import merged_trunk, reference_logits, write_adapter
from qadapter.exporting.verification import Check, Reference, check_export, check_states
from qadapter.system import manifest
from qadapter.system.locking import lock_of, remove_stale, sole_run
from qadapter.system.scratch import remove_abandoned, scratch_folder
from qadapter.trunk.loading import shell_of

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel

Form = Literal["merged", "lm_head_lora", "peft", "gguf"]
FORMS = ("merged", "lm_head_lora", "peft", "gguf")
_FROM_MERGED = ("gguf",)
"""Made from a merged checkpoint, and nothing else."""


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


def export(
    model: QAdapterModel, output_dir: str | Path, form: Form = "merged", *,
    approximate: bool = False, texts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None, max_shard_size: int | str | None = None,
    gguf_type: str = "auto", llama_cpp_dir: str | Path | None = None,
) -> ExportReport:
    """Write the customised policy, at the strength it is set to, for engines that don't know us.

    Args:
        output_dir: a folder that is not there yet, or empty. It appears whole or not at all.
        form: "merged": a checkpoint of the base's own architecture. "lm_head_lora": a head adapter
            as a PEFT LoRA on the output layer. "peft": a LoRA of the trunk as PEFT writes it.
            "gguf": the merged checkpoint as one file for llama.cpp.
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

    Raises:
        QAdapterError: the policy has no exact export of this form (with the reason), the folder is
            not empty or can't be written, or the check failed (with what differs).
    """
    if form not in FORMS:
        raise QAdapterError(f"form must be {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {form!r}")
    if texts is not None and not approximate and form not in _FROM_MERGED:
        raise QAdapterError("texts are for approximate=True, and for form gguf")
    if form not in _FROM_MERGED and (gguf_type != "auto" or llama_cpp_dir is not None):
        raise QAdapterError("gguf_type and llama_cpp_dir are for form gguf")
    if gguf_type not in ("auto", *TYPES):
        raise QAdapterError(f"gguf_type must be auto, {', '.join(TYPES)}, got {gguf_type!r}")
    target = Path(output_dir).expanduser().absolute()
    remove_abandoned(target.parent)  # a model's size, each
    remove_stale(lock_of(target, beside=True))
    _check_free(target)
    tokenizer, template_chosen = _tokenizer(model, tokenizer)
    planned = "merged" if form in _FROM_MERGED else form
    _check_policy(model, planned)
    as_gguf = None
    if form in _FROM_MERGED:
        check_possible(model.base.config, tokenizer, not model.adapts_trunk, llama_cpp_dir)
        as_gguf = _AsGguf(
            form, own_type(model.base.dtype) if gguf_type == "auto" else gguf_type, llama_cpp_dir,
            () if texts is None else _token_ids(texts, tokenizer),
        )
    if model.adapts_trunk:
        exporter: _HeadExport | BlockExport | _TrunkExport = _plan_trunk(
            model, planned, approximate
        )
    else:
        fitted_to = texts if approximate else None
        exporter = _plan_head(model, planned, approximate, fitted_to, tokenizer)
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


# --- what can be exported -----------------------------------------------------------------------


def _check_policy(model: QAdapterModel, form: str) -> None:
    """Refuse, with the reason, what no single head or stream can be."""
    p_a, p_b = model.policy.stream_weights()
    if p_a == 0:
        raise QAdapterError(
            "at strength 0 the policy is the base itself: there is nothing to export"
        )
    cap = model.head.softcap
    if cap is not None and (p_b != 0 or (form == "merged" and p_a != 1)):
        raise QAdapterError(
            f"the base caps its logits (softcap {cap:g}), which is not linear: this policy adds up "
            f"two capped streams (weights {p_a:g} and {p_b:g}) and is no single head. A policy "
            "trained in the policy parametrization can be exported at strength 1"
        )


def _plan_head(
    model: QAdapterModel, form: str, approximate: bool,
    texts: Sequence[str] | Sequence[Sequence[int]] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> _HeadExport | BlockExport:
    if form == "peft":
        raise QAdapterError(
            'form "peft" is for LoRA in the trunk; a head adapter becomes a PEFT folder by form '
            '"lm_head_lora"'
        )
    _check_output_layer(model.base)
    weights = model.policy.stream_weights()
    if form == "lm_head_lora" and sum(weights) <= 0:
        raise QAdapterError(
            f"lm_head_lora: the streams' weights sum to {sum(weights):g}, so no LoRA beside the "
            'unscaled lm_head gives this policy at any temperature; form "merged" does'
        )
    adapter = model.adapter
    if adapter.reads_before_norm and not approximate:
        return plan_block(model, form)
    if isinstance(adapter, LinearHeadAdapter):
        if approximate:
            raise QAdapterError("approximate is not needed: a linear adapter is exported exactly")
        policy = LinearPolicy(model.head, adapter.down.weight, adapter.up.weight, *weights)
        return _HeadExport(model, form, policy)
    if not isinstance(adapter, HeadAdapter):
        raise QAdapterError(f"a {type(adapter).__name__} can't be exported")
    if not approximate:
        raise QAdapterError(
            f"an adapter of form {model.adapter_config.form!r} is not linear, so no lm_head equals "
            "it; approximate (with texts to fit to) exports the nearest linear adapter and says "
            "how near it is"
        )
    if texts is None:
        raise QAdapterError("approximate needs texts to fit to, like those the model is for")
    rank = None if form == "merged" else model.adapter_config.rank
    return _HeadExport(model, form, *fit_linear(model, _token_ids(texts, tokenizer), rank))


def _plan_trunk(model: QAdapterModel, form: str, approximate: bool) -> _TrunkExport:
    if approximate:
        raise QAdapterError("approximate is for head adapters, this one is in the trunk")
    if form == "lm_head_lora":
        raise QAdapterError('form "lm_head_lora" is for head adapters; LoRA in the trunk takes '
                            '"merged" or "peft"')
    if len(model.adapter.names) > 1:
        raise QAdapterError(
            f"a composition of {len(model.adapter.names)} adapters in the trunk runs as many "
            "streams, and no single model is all of them: serve it with QAdapterModel itself"
        )
    p_a, p_b = model.policy.stream_weights()
    if p_b != 0:
        raise QAdapterError(
            f"this policy runs two streams through the trunk (weights {p_a:g} adapted, {p_b:g} "
            "base), and no single model is both. One trained in the policy parametrization needs "
            "one stream at strength 1 and the α's it was trained with: export that"
        )
    if form == "merged" and getattr(model.base, "is_quantized", False):
        raise QAdapterError(
            "the base is quantized, and merging would round its weights once more: load it in 16 "
            'bits to merge, or take form "peft"'
        )
    return _TrunkExport(model, form)


@dataclasses.dataclass(frozen=True)
class _HeadExport:
    """A policy of one matrix product."""

    model: QAdapterModel
    form: str
    policy: LinearPolicy
    approximation: Approximation | None = None

    @property
    def rank(self) -> int:
        return self.policy.down_RD.shape[0]

    @property
    def logits_factor(self) -> float:
        """The policy's logits over the export's."""
        return 1.0 if self.form == "merged" else self.policy.weight_sum

    @property
    def reference(self) -> Reference:
        stored = self.model.base.dtype if self.form == "merged" else torch.float32

        def reference(prompts, decoded, states_KD):
            check_states(self.model.base, prompts, decoded, states_KD)
            return self.policy.exact_logits(states_KD, stored)

        return reference

    def checkpoint(self) -> PreTrainedModel:
        shell = shell_of(self.model.base)
        checkpoints.replace_head(shell, self.policy.merged_weight(), self.policy.merged_bias())
        return shell

    def write_peft(self, folder: Path, base_name: str | None, revision: str | None) -> None:
        shell = shell_of(self.model.base)
        name = checkpoints.output_layer(shell)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.rank, lora_dropout=0.0, target_modules=[name],
            bias="none", task_type="CAUSAL_LM", base_model_name_or_path=base_name,
            revision=revision,
        )
        with warnings.catch_warnings():
            # PEFT warns those who merge of tied embeddings; nothing is merged here.
            warnings.simplefilter("ignore")
            peft_model = get_peft_model(shell, config)
            layer = peft_model.get_base_model().get_submodule(name)
            for linear, weight in zip(
                (layer.lora_A["default"], layer.lora_B["default"]), self.policy.lora(), strict=True
            ):
                linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            peft_model.save_pretrained(str(folder), save_embedding_layers=False)


@dataclasses.dataclass(frozen=True)
class _TrunkExport:
    """A LoRA whose policy is its adapted stream, times p_a."""

    model: QAdapterModel
    form: str
    approximation: None = None

    @property
    def rank(self) -> int:
        return getattr(self.model.adapter_config, "r", 0)

    @property
    def logits_factor(self) -> float:
        return 1.0 if self.form == "merged" else self.model.policy.stream_weights()[0]

    @property
    def reference(self) -> Reference:
        p_a, _ = self.model.policy.stream_weights()
        return lambda prompts, decoded, _: reference_logits(self.model.base, p_a, prompts, decoded)

    def checkpoint(self) -> PreTrainedModel:
        return merged_trunk(self.model)

    def write_peft(self, folder: Path, base_name: str | None, revision: str | None) -> None:
        write_adapter(self.model, folder, base_name, revision)


# --- writing it ---------------------------------------------------------------------------------


def _write_and_check(
    exporter: _HeadExport | BlockExport | _TrunkExport, scratch: Path, target: Path,
    tokenizer: PreTrainedTokenizerBase | None, template_chosen: bool,
    max_shard_size: int | str | None, as_gguf: _AsGguf | None,
) -> ExportReport:
    model, form = exporter.model, exporter.form
    base_name, revision = checkpoints.name_of(model.base)
    generation_config = copy.deepcopy(model.generation_config)
    if template_chosen:  # then the base's settings don't know what ends a turn
        generation_config.eos_token_id = end_of_turn_ids(model, tokenizer)
    temperature = (generation_config.temperature or 1.0) / exporter.logits_factor
    folder = scratch / "export"
    folder.mkdir()
    checked_base = None
    if form == "merged":
        checkpoints.write_checkpoint(
            exporter.checkpoint(), folder, generation_config,
            max_shard_size or checkpoints.shard_size_of(model.base),
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    else:
        if template_chosen:
            tokenizer.save_pretrained(folder)
        tokenizer = None  # engines take the base's
        exporter.write_peft(folder, base_name, revision)
        if temperature != 1.0:
            generation_config.temperature = temperature
        generation_config.to_json_file(folder / "generation_config.json")
        checked_base = base_name or _write_base(model, scratch / "base")
    check = check_export(
        folder, scratch, model, exporter.reference, base=checked_base, revision=revision,
        logits_factor=exporter.logits_factor, temperature=temperature, tokenizer=tokenizer,
    )
    gguf = None
    if as_gguf is not None:
        form = as_gguf.form
        checkpoint = folder.rename(scratch / "checkpoint")
        folder.mkdir()
        gguf = as_gguf.write(checkpoint, folder, target.name, scratch, tokenizer)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    write_card(
        folder, target.name, model, form, base_name, exporter.rank, temperature,
        tokenizer is not None, check, exporter.approximation, gguf,
    )
    manifest.write(folder, files)  # not the card: it is for people, who may write on
    return ExportReport(
        form, target, temperature, tokenizer is not None, check, exporter.approximation, gguf
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
        tokenizer: PreTrainedTokenizerBase,
    ) -> GgufCheck:
        ends = GenerationConfig.from_pretrained(checkpoint).eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        file = folder / f"{name}.gguf"
        make_gguf(checkpoint, file, self.kind, name, ends, self.llama_cpp_dir)
        return check_gguf(file, checkpoint, scratch, self.kind, tokenizer, self.texts)


def _write_base(model: QAdapterModel, folder: Path) -> str:
    """A base that is in memory only, as a folder that stock libraries load."""
    model.bare_base().save_pretrained(folder)
    return str(folder)


def _check_output_layer(base: PreTrainedModel) -> None:
    layer = base.get_output_embeddings()
    names = {name for name, _ in layer.named_parameters()}
    if not names <= {"weight", "bias"} or not layer.weight.is_floating_point():
        raise QAdapterError(
            f"the base's output layer is a {type(layer).__name__} with {', '.join(sorted(names))}, "
            "no plain linear layer: merge its own adapter, or load it unquantized, first"
        )


def _token_ids(
    texts: Sequence[str] | Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None
) -> Sequence[Sequence[int]]:
    if not any(isinstance(text, str) for text in texts):
        return texts
    if tokenizer is None:
        raise QAdapterError("texts given as strings need a tokenizer")
    return tokenizer(list(texts), verbose=False)["input_ids"]


def _check_free(folder: Path) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise QAdapterError(f"output_dir {folder} is a file, or a link to none")
    if folder.is_dir() and any(folder.iterdir()):
        raise QAdapterError(f"output_dir {folder} is not empty: choose another")
