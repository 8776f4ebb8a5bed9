"""Whether a model's checkpoint is whole: transformers draws at random what it doesn't find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from qadapter.errors import QAdapterError, listed, shown
from qadapter.system import manifest
from qadapter.system.documents import read_json
from qadapter.system.textfiles import read_text
from qadapter.trunk.base_dtype import dtype_name
from qadapter.trunk.sharding import full

_OBJECTS = ("config.json", GENERATION_CONFIG_NAME, "tokenizer.json", "tokenizer_config.json")
_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require_all(model: PreTrainedModel, report: dict[str, Any], name: str | Path) -> None:
    """
    Args:
        report: what ``from_pretrained(…, output_loading_info=True)`` gives with a model.
        name: of the model, for messages.

    Raises:
        QAdapterError: its checkpoint lacks a tensor, has one of another shape or of NaN; names it.
    """
    if missing := sorted(report["missing_keys"]):
        raise QAdapterError(
            f"{name} is not whole: no file of it holds {listed(missing, 3)}, which would be random "
            "numbers: copy the model again, or take one of this architecture"
        )
    if wrong := sorted(map(str, report["mismatched_keys"])):
        raise QAdapterError(
            f"{name} doesn't fit its config.json: {listed(wrong, 3)} has another shape there, and "
            "would be random numbers"
        )
    require_finite(model, name)


@torch.no_grad()
def require_finite(model: PreTrainedModel, name: str | Path) -> None:
    """Raises QAdapterError where a parameter in memory holds NaN or an infinity. A bias of −inf,
    which takes a token out, is none."""
    wrong = []
    for parameter_name, x in model.named_parameters():
        if x.dtype not in _REAL or x.is_meta or not x.numel():
            continue
        least, greatest = (float(bound) for bound in torch.aminmax(full(x)))
        masks = x.dim() == 1 and least == -torch.inf
        if not (greatest < torch.inf and (least > -torch.inf or masks)):
            wrong.append(f"{parameter_name} ({dtype_name(x.dtype)})")
    if wrong:
        raise QAdapterError(
            f"{name}: {listed(wrong, 3)} holds NaN or infinite numbers: the checkpoint is damaged, "
            "or its numbers don't fit this dtype"
        )


def require_as_written(folder: str | Path) -> None:
    """Hold a model that was written with a manifest, as exports are, against it: all that is
    listed. Nothing is known of other folders, and of names of the hub.

    Raises:
        QAdapterError: a file is missing, or is not what was written; names it.
    """
    folder = Path(folder).expanduser()
    path = folder / manifest.MANIFEST_NAME
    if path.is_file():
        try:
            found = manifest.read(path)
        except QAdapterError:
            return  # of another tool
        found.check(folder)


def require_generation_config(folder: str | Path) -> None:
    """transformers passes over a generation_config.json that it can't read, and with it over what
    ends an answer.

    Args:
        folder: of a model; names of the hub are passed over.

    Raises:
        QAdapterError: it is there and can't be read.
    """
    path = Path(folder).expanduser() / GENERATION_CONFIG_NAME
    if os.path.lexists(path) and not isinstance(read_json(path), dict):
        raise QAdapterError(f"{path} holds no settings: copy the model again")


def require_own_shards(folder: str | Path) -> None:
    """transformers reads whatever files an index of weights names, also outside the folder.

    Args:
        folder: of a model; names of the hub are passed over.

    Raises:
        QAdapterError: an index names a file outside, or can't be read.
    """
    for path in sorted(Path(folder).expanduser().glob("*.index.json")):
        found = read_json(path)
        named = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(named, dict) or not all(isinstance(x, str) for x in named.values()):
            raise QAdapterError(f"{path} is no index of weights: copy the model again")
        for name in sorted(set(named.values())):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise QAdapterError(f"{path} names {shown(name)}, which is no file of its folder")


def damaged_file(folder: str | Path) -> str | None:
    """A line about the first file of a model in a local folder that can't be read: what
    transformers says names none."""
    for path in sorted(Path(folder).expanduser().glob("*.json")):
        try:
            found = read_json(path)
        except QAdapterError as error:
            return f"{error}; copy the model again"
        if path.name in _OBJECTS and not isinstance(found, dict):
            return f"{path} holds {shown(found)}, no settings; copy the model again"
    for path in sorted(Path(folder).expanduser().glob("*.jinja")):
        try:
            read_text(path)
        except QAdapterError as error:
            return f"{error}; copy the model again"
    for path in sorted(Path(folder).expanduser().glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path} is damaged ({error}); copy the model again"
    return None


def misfit(folder: str | Path, model: nn.Module | None) -> str | None:
    """A line about the first tensor of a local folder that has another shape than in the model
    that its config.json describes: what transformers says names none.

    Args:
        model: the model, on the meta device.
    """
    state = {} if model is None else model.state_dict()
    for path in sorted(Path(folder).expanduser().glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                shape = file.get_slice(name).get_shape()
                if name in state and list(state[name].shape) != shape:
                    return (
                        f"{path} holds {shown(name)} of shape {shape}, but config.json describes "
                        f"{list(state[name].shape)}"
                    )
    return None
