"""Writing a model that is a frozen base but for a few tensors."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.errors import HFValidationError
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from qadapter.errors import QAdapterError
from qadapter.policy.adapter_files import PEFT_CONFIG_NAME
from qadapter.trunk.lm_head import LanguageModelHead
from qadapter.trunk.older_names import add_older_tokenizer


def output_layer(model: PreTrainedModel) -> str:
    """Name of the module that makes logits."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def replace_head(shell: PreTrainedModel, weight: Tensor, bias: Tensor | None) -> None:
    """Give a shell an output layer of its own; where it was the input embedding, it no longer is.

    Raises:
        QAdapterError: a weight beyond the range of its dtype.
    """
    if not weight.isfinite().all():
        raise QAdapterError(
            f"the merged lm_head does not fit {weight.dtype}: load the base in bfloat16 or float32"
        )
    name = output_layer(shell)
    head = shell.get_submodule(name)
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    for config in (shell.config, shell.config.get_text_config()):
        config.tie_word_embeddings = False
    shell.all_tied_weights_keys = {
        tied: source for tied, source in shell.all_tied_weights_keys.items()
        if name not in (tied.rpartition(".")[0], source.rpartition(".")[0])
    }


def scaled(head: LanguageModelHead, factor: float) -> tuple[Tensor, Tensor | None]:
    """A head's weight and bias times a factor, rounded once."""
    weight, bias = (
        None if x is None else (factor * x.double()).to(x.dtype) for x in (head.weight, head.bias)
    )
    return weight, bias


_EVER_IN_PEFT = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "target_modules", "bias", "fan_in_fan_out", "modules_to_save",
)
"""Fields that every version has, and engines look for."""
_PIECES = "tokenizer.model"
"""Sentencepiece's file."""
_NAMING_CODE = ("auto_map", "custom_pipelines")
"""What names Python files beside a base, which an export doesn't have."""


def write_checkpoint(
    model: PreTrainedModel, folder: Path, generation_config: GenerationConfig,
    max_shard_size: int | str,
) -> None:
    """``save_pretrained`` with a generation config.

    Raises:
        QAdapterError: a generation config that transformers refuses to write.
    """
    model.generation_config = copy.deepcopy(generation_config)
    if _is_stock(model):
        for name in _NAMING_CODE:
            vars(model.config).pop(name, None)
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise QAdapterError(f"the export can't be written: {error}") from error


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """``save_pretrained``, so that older versions of transformers read it too; with the pieces that
    it was made from, where they are beside it: llama.cpp's converter looks for them."""
    tokenizer.save_pretrained(folder)
    add_older_tokenizer(folder, tokenizer)
    try:
        pieces = tokenizer.name_or_path and cached_file(
            tokenizer.name_or_path, _PIECES, local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, HFValidationError):  # a name of nothing
        return
    if pieces and not (folder / _PIECES).exists():
        shutil.copyfile(pieces, folder / _PIECES)


def leave_out_defaults(folder: Path) -> None:
    """Take what says nothing out of ``adapter_config.json``: versions of PEFT, and engines, may
    refuse a field that they don't know."""
    path = folder / PEFT_CONFIG_NAME
    fields = json.loads(path.read_text(encoding="utf-8"))
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[fields["peft_type"]])
    }
    plain = {
        name: x for name, x in fields.items()
        if name in _EVER_IN_PEFT or (name != "peft_version" and x != defaults.get(name))
    }
    path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- what came with the base --------------------------------------------------------------------


def name_of(base: PreTrainedModel) -> tuple[str | None, str | None]:
    """(name or folder that transformers loads, revision), or Nones for a base only in memory."""
    name = base.name_or_path
    if not name:
        return None, None
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    return name, getattr(base.config, "_commit_hash", None)


class PublicName(NamedTuple):
    """What a base is called by those who get an export."""

    name: str | None
    """None: it is only in memory."""
    revision: str | None
    on_hub: bool


def public_name_of(base: PreTrainedModel) -> PublicName:
    """A hub's name; of a folder the place as it was given or, where that holds on this machine
    alone, its last part."""
    name, revision = name_of(base)
    if name is None or not Path(name).is_dir():
        return PublicName(name, revision, name is not None)
    folder, given = Path(name), Path(base.name_or_path)
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):  # the hub's cache
        hub = repository.removeprefix("models--").replace("--", "/", 1)
        return PublicName(hub, folder.name, True)
    return PublicName(folder.name if given.is_absolute() else str(given), None, False)


def tokenizer_of(base: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer as it came, or None if it came without."""
    name, revision = name_of(base)
    if name is None:
        return None
    try:
        # Without a word about code of its own, transformers would ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, HFValidationError):
        return None
    if _is_stock(tokenizer):
        for name in _NAMING_CODE:
            tokenizer.init_kwargs.pop(name, None)
    # Without files transformers makes up a tokenizer of the right class that knows no word.
    return tokenizer if tokenizer("word")["input_ids"] else None


def _is_stock(part: object) -> bool:
    """Whether its code is transformers' own, so that nothing else is needed to load it."""
    return type(part).__module__.startswith("transformers.")


def shard_size_of(base: PreTrainedModel) -> int | str:
    """Bytes of the base's largest shard; transformers' default where it is in one file."""
    name, revision = name_of(base)
    index = name and cached_file(
        name, SAFE_WEIGHTS_INDEX_NAME, revision=revision, local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if not index:
        return "50GB"
    shards = Path(index).parent.glob("*.safetensors")
    return max((shard.stat().st_size for shard in shards), default="50GB")
