"""Adapters on disk: ``adapter_model.safetensors`` and ``qadapter_config.json``.

Safetensors and JSON only. The adapter's file follows PEFT's name; ours beside it holds the
adapter, the objective it was trained with, which base it belongs to, and library versions. A LoRA
is described by PEFT's own ``adapter_config.json``, and the folder is a PEFT adapter too.
``manifest.json``, written last, holds the digest of every file that a load reads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import CHAT_TEMPLATE_FILE

from qadapter.adapters.head_adapter import AdapterConfig, HeadAdapter
from qadapter.adapters.planning import planned_weights
from qadapter.errors import QAdapterError, shown
from qadapter.objective import ObjectiveConfig
from qadapter.policy.adapter_files import (
    CONFIG_NAME,
    PEFT_CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFiles,
)
from qadapter.policy.authors_files import TRAINING_CONFIG_NAME, authors_objective
from qadapter.system import manifest
from qadapter.system.documents import MAX_CONFIG_BYTES, read_json
from qadapter.system.modes import give_usual_modes
from qadapter.system.scratch import scratch_folder
from qadapter.system.textfiles import read_text
from qadapter.trunk.identity import BaseIdentity

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from qadapter.adapters.lora import LoraAdapter

FORMAT_VERSION = 3
_READABLE = (1, 2, FORMAT_VERSION)
"""1 knew a base by its head and a hash of its whole configuration; 1 and 2 had no manifest."""
_WITH_MANIFEST = 3

Place = str | Path | AdapterFiles
"""A folder, a hub name, or one of them whose manifest was read already: several calls for one load
then hold all files against the same."""


@dataclasses.dataclass(frozen=True)
class Composition:
    """Adapters in folders of their own, and the weights of their Q-functions."""

    folders: tuple[Path, ...]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """What ``qadapter_config.json`` and, for LoRA, ``adapter_config.json`` say."""

    adapter: AdapterConfig | PeftConfig | Composition
    objective: ObjectiveConfig
    base: BaseIdentity | None
    """None for a plain PEFT adapter: it doesn't say enough to tell one base from another."""
    base_name: str | None
    versions: dict[str, str]

    def require_base(self, base: BaseIdentity, adapter_dir: Place) -> None:
        """Raises QAdapterError if it was trained on another base, as far as it says."""
        if self.base is not None:
            self.base.require(base, adapter_dir)


def describe(adapter: AdapterConfig | PeftConfig) -> dict[str, Any]:
    """What an adapter is, as JSON; two adapters of one description have the same parameters."""
    if isinstance(adapter, AdapterConfig):
        return dataclasses.asdict(adapter)
    fields = adapter.to_dict()
    for name in (
        "inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping",
    ):
        fields.pop(name, None)
    return {
        "kind": fields.pop("peft_type").lower(),
        **{k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()},
    }


def told(adapter: AdapterConfig | PeftConfig) -> dict[str, Any]:
    """``describe`` for people: without what is as PEFT has it where nobody asks for another."""
    described = describe(adapter)
    if isinstance(adapter, AdapterConfig):
        return described
    usual = describe(type(adapter)())
    always = {"kind", "r", "lora_alpha", "target_modules"}
    return {k: v for k, v in described.items() if k in always or v != usual.get(k)}


def write(
    folder: str | Path, weights: dict[str, Tensor], adapter: AdapterConfig | PeftConfig,
    objective: ObjectiveConfig, base: BaseIdentity, chat_template: str | None = None,
) -> None:
    """Write an adapter, and a manifest of its files when all are there.

    Until it is written whole, a folder that is written again doesn't count as an adapter; if a file
    can't even be made, it stays as it was.

    Raises:
        QAdapterError: the folder can't be written (no space left, no permission, …).
    """
    folder = Path(folder)
    weights = {name: x.detach().to("cpu").contiguous() for name, x in weights.items()}
    with _new_files(folder, "the adapter") as scratch:
        text = _description(describe(adapter), objective, base, chat_template)
        (scratch / CONFIG_NAME).write_text(text, encoding="utf-8")
        if not isinstance(adapter, AdapterConfig):
            inactive = copy.copy(adapter)
            inactive.inference_mode = True  # as PEFT saves its own
            inactive.save_pretrained(str(scratch))
        _write_template(scratch, chat_template)
        save_file(weights, scratch / WEIGHTS_NAME, metadata={"format": "pt"})
        give_usual_modes(scratch)
        manifest.write(folder, _replace(folder, scratch))


def write_composition(
    folder: str | Path, parts: Sequence[tuple[PeftConfig, ObjectiveConfig, dict[str, Tensor]]],
    weights: Sequence[float], objective: ObjectiveConfig, base: BaseIdentity,
    chat_template: str | None = None,
) -> None:
    """Write adapters of the trunk (configuration, objective, weights), a folder for each, and how
    they are composed; the manifest lists those of the adapters.

    Raises:
        QAdapterError: the folder can't be written.
    """
    folder = Path(folder)
    names = [f"adapter-{number}" for number in range(len(parts))]
    adapter = {"kind": "composition", "adapters": names, "weights": list(weights)}
    with _new_files(folder, "the composition") as scratch:
        text = _description(adapter, objective, base, chat_template)
        (scratch / CONFIG_NAME).write_text(text, encoding="utf-8")
        _write_template(scratch, chat_template)
        files = _replace(folder, scratch)
        for name, (config, own, tensors) in zip(names, parts, strict=True):
            write(folder / name, tensors, config, own, base)
        manifest.write(folder, [*files, *(f"{name}/{manifest.MANIFEST_NAME}" for name in names)])


@contextlib.contextmanager
def _new_files(folder: Path, what: str) -> Iterator[Path]:
    """A scratch folder inside, on the same file system."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder, "saving") as scratch:
            yield scratch
    except (OSError, SafetensorError) as error:
        raise QAdapterError(f"{folder}: {what} can't be saved: {error}") from error


def _write_template(folder: Path, template: str | None) -> None:
    if template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _replace(folder: Path, scratch: Path) -> list[str]:
    """Move new files to their places; their names.

    The description goes first: it says that a manifest belongs to it, so that no other file of this
    adapter ever passes for a part of an older one.
    """
    names = sorted(path.name for path in scratch.glob("[!.]*"))
    names.sort(key=lambda name: name != CONFIG_NAME)
    for name in names:
        if (folder / name).is_dir():  # seen before anything is replaced
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
    manifest.remove(folder)
    for name in names:
        with open(scratch / name, "rb") as file:
            os.fsync(file.fileno())  # the manifest is to be the last on the disk, too
        os.replace(scratch / name, folder / name)
    return names


def _description(
    adapter: dict[str, Any], objective: ObjectiveConfig, base: BaseIdentity,
    chat_template: str | None,
) -> str:
    names = ("qadapter", "torch", "transformers")
    description = {
        "format_version": FORMAT_VERSION,
        "adapter": adapter,
        "objective": dataclasses.asdict(objective),
        "base": dataclasses.asdict(base),
        "chat_template": chat_template is not None,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    return json.dumps(description, indent=2) + "\n"


def read(adapter_dir: Place, objective: ObjectiveConfig | None = None) -> SavedAdapter:
    """Read ``qadapter_config.json``; where there is none, a PEFT adapter's ``adapter_config.json``,
    and what the authors' code writes beside it.

    Args:
        objective: of a plain PEFT adapter that nothing is beside; others have theirs.

    Raises:
        QAdapterError: missing, not JSON, of a version this library doesn't know; not what was
            saved, as its manifest tells; an objective that is missing or not wanted.
    """
    files = AdapterFiles.of(adapter_dir)
    if not files.lists(CONFIG_NAME) and files.has(PEFT_CONFIG_NAME):
        known = authors_objective(files)
        trained_with = known or objective
        if trained_with is None:
            raise QAdapterError(
                f"{adapter_dir}: a PEFT adapter without {CONFIG_NAME}, or the authors' "
                f"{TRAINING_CONFIG_NAME}: load it in Python with the objective it was trained "
                "with, such as objective=ObjectiveConfig.authors(), and save it"
            )
        if known is not None and objective not in (None, known):
            raise QAdapterError(f"{adapter_dir}: trained with another objective, as its "
                                f"{TRAINING_CONFIG_NAME} says: {known}")
        adapter = _read_peft(files)
        return SavedAdapter(
            adapter, trained_with, None, adapter.base_model_name_or_path or None, {}
        )
    path = files.checked(CONFIG_NAME)
    description = read_json(path, most=MAX_CONFIG_BYTES)
    try:
        version = description["format_version"]
        if version not in _READABLE:
            raise QAdapterError(
                f"{path}: format version {shown(version)}, this is {FORMAT_VERSION}"
            )
        if version >= _WITH_MANIFEST and files.manifest is None:
            raise QAdapterError(
                f"{adapter_dir}: {manifest.MANIFEST_NAME} is missing: saving it was never "
                "finished, or a part of it was not copied"
            )
        if description.get("chat_template") and not files.lists(CHAT_TEMPLATE_FILE):
            raise QAdapterError(f"{adapter_dir}: {manifest.MANIFEST_NAME} lists no "
                                f"{CHAT_TEMPLATE_FILE}, which was saved with the adapter")
        base, adapter = BaseIdentity.saved(description["base"]), description["adapter"]
        saved = SavedAdapter(
            adapter=_read_adapter(files, adapter),
            objective=ObjectiveConfig(**description["objective"]),
            base=base, base_name=base.name, versions=description["versions"],
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise QAdapterError(f"{path}: not a Q-Adapter configuration: {error}") from error
    if objective not in (None, saved.objective):
        raise QAdapterError(f"{path}: the adapter was trained with another objective")
    return saved


def _read_adapter(
    files: AdapterFiles, adapter: dict[str, Any]
) -> AdapterConfig | PeftConfig | Composition:
    if adapter["kind"] == "head":
        return AdapterConfig(**adapter)
    if adapter["kind"] == "composition":
        return _read_composition(files, **adapter)
    path = files.checked(PEFT_CONFIG_NAME)
    config = _read_peft(files)
    found = json.loads(json.dumps(describe(config)))
    for name, value in adapter.items():
        # Versions of PEFT know of more fields, or of fewer.
        if found.get(name) != value and (name in found or value):
            raise QAdapterError(
                f"{path}: {name} is {shown(found.get(name))}, but {CONFIG_NAME} says "
                f"{shown(value)}: one of the two was changed"
            )
    return config


def _read_composition(
    files: AdapterFiles, kind: str, adapters: list[str], weights: list[float]
) -> Composition:
    if not (isinstance(adapters, list) and isinstance(weights, list)):
        raise ValueError("a composition has lists of adapters and of their weights")
    if len(adapters) != len(weights) or not adapters:
        raise ValueError("not a weight for each of its adapters")
    folders = []
    for name in adapters:
        files.require_inside(name)
        if files.manifest is not None:
            files.checked(f"{name}/{manifest.MANIFEST_NAME}")
        parts = [files.locate(f"{name}/{file}") for file in
                 (CONFIG_NAME, PEFT_CONFIG_NAME, WEIGHTS_NAME)]
        folders.append(parts[0].parent)
    return Composition(tuple(folders), tuple(map(float, weights)))


def _read_peft(files: AdapterFiles) -> PeftConfig:
    from qadapter.adapters.peft_config import read_config

    return read_config(files.checked(PEFT_CONFIG_NAME))


def load_weights(adapter_dir: Place, adapter: HeadAdapter | LoraAdapter) -> None:
    """Load ``adapter_model.safetensors`` into an adapter of the right form.

    Raises:
        QAdapterError: as ``read_weights`` and ``require_fitting``.
    """
    weights = read_weights(adapter_dir)
    require_fitting(adapter_dir, weights, adapter.state_dict())
    adapter.load_state_dict(weights)


def read_weights(adapter_dir: Place) -> dict[str, Tensor]:
    """What ``adapter_model.safetensors`` holds.

    Raises:
        QAdapterError: missing, damaged, or not what was saved; NaN or an infinity, also in
            float32, in which adapters compute.
    """
    path = AdapterFiles.of(adapter_dir).checked(WEIGHTS_NAME)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise QAdapterError(f"{path}: damaged or not a safetensors file: {error}") from error
    for name, x in weights.items():
        if x.is_floating_point() and not torch.isfinite(x.float()).all():
            raise QAdapterError(f"{path}: {shown(name)} holds NaN or infinite numbers")
    return weights


def require_fitting(
    adapter_dir: Place, weights: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """
    Args:
        expected: an adapter's state dict, or what is planned for it.

    Raises:
        QAdapterError: names, shapes or kinds of numbers are others; names the first.
    """
    path = Path(str(adapter_dir)) / WEIGHTS_NAME
    for name in sorted({*weights, *expected}):
        found, wanted = (_kind(tensors.get(name)) for tensors in (weights, expected))
        if found != wanted:
            raise QAdapterError(
                f"{path}: {shown(name)} is {found}, but its configuration describes {wanted}"
            )


def require_planned(
    adapter_dir: Place, weights: dict[str, Tensor], base: PreTrainedModel,
    adapter: AdapterConfig | PeftConfig,
) -> None:
    """Hold weights against a configuration before anything of its sizes is made; raises as
    ``require_fitting``."""
    try:
        planned = planned_weights(base, adapter)
    except QAdapterError as error:
        raise QAdapterError(f"{adapter_dir}: {error}") from error
    if planned is not None:
        require_fitting(adapter_dir, weights, planned)


def _kind(x: Tensor | None) -> str:
    if x is None:
        return "not there"
    numbers = "numbers" if x.is_floating_point() else str(x.dtype).removeprefix("torch.")
    return f"{' × '.join(map(str, x.shape))} {numbers}".strip()


def is_whole(adapter_dir: Place) -> bool:
    """Whether an adapter is there, and all of it is what was saved."""
    try:
        if not isinstance(read(adapter_dir).adapter, Composition):
            read_weights(adapter_dir)
        read_chat_template(adapter_dir)
    except QAdapterError:
        return False
    return True


def read_chat_template(adapter_dir: Place) -> str | None:
    """The chat template that an adapter was trained with, where one was saved with it.

    Raises:
        QAdapterError: not what was saved, or no text.
    """
    files = AdapterFiles.of(adapter_dir)
    return read_text(files.checked(CHAT_TEMPLATE_FILE)) if files.lists(CHAT_TEMPLATE_FILE) else None
