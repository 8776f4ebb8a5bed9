"""What is asked of transformers' ``distributed_config``, held against what can be served before
anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from transformers.distributed import DistributedConfig

from qadapter.errors import QAdapterError, nearest, shown

WAY = (
    "load it with AutoModelForCausalLM.from_pretrained(…, distributed_config=DistributedConfig("
    "fsdp_size=N)) on N processes, or whole on each (data parallelism)"
)
"""Out of a layout that is refused."""
QUANTIZED = (
    "a quantized base can't be sharded: load it whole on each GPU (data parallelism), where it may "
    "fit; or shard it without quantization"
)
MODES = {
    "pp_size": "pipeline parallelism", "ep_size": "expert parallelism",
    "enable_expert_parallel": "expert parallelism",
}
"""Fields of transformers' DistributedConfig, and what a size above 1 means."""
FSDP2, TENSOR_PARALLEL = "FSDP2", "tensor parallelism"
"""Engines that are served."""
_SIZES = ("fsdp_size", "dp_replicate_size", "tp_size", "pp_size")
"""Those that multiply to the number of processes."""


def read_config(given: Any) -> DistributedConfig:
    """transformers' ``distributed_config``, of an object or a mapping.

    Raises:
        QAdapterError: an unknown field, a size that is none, more or fewer processes than there
            are, or a parallelism that can't be served.
    """
    if not isinstance(given, (Mapping, DistributedConfig)):
        raise QAdapterError(f"distributed_config must map names to values, got {shown(given)}")
    fields = dict(given) if isinstance(given, Mapping) else vars(given)
    for name, mode in MODES.items():
        if asks_for(fields.get(name)):
            raise QAdapterError(f"distributed_config: {mode} ({name}) can't be served: {WAY}")
    known = {field.name for field in dataclasses.fields(DistributedConfig)}
    if isinstance(given, Mapping) and (unknown := sorted(map(str, fields.keys() - known))):
        raise QAdapterError(
            f"distributed_config has no {shown(unknown[0])}{nearest(unknown[0], sorted(known))}"
        )
    sizes = {name: fields.get(name) for name in _SIZES}
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            raise QAdapterError(
                f"distributed_config: {name} must be a number of processes, got {shown(size)}"
            )
    if (sizes["tp_size"] or 1) > 1 and (sizes["fsdp_size"] or 1) * (
        sizes["dp_replicate_size"] or 1
    ) > 1:
        raise QAdapterError(
            "distributed_config: fsdp_size and tp_size together can't be served: take one of them"
        )
    needed = math.prod(size or 1 for size in sizes.values())
    there = dist.get_world_size() if dist.is_initialized() else int(os.getenv("WORLD_SIZE", "1"))
    if needed not in (1, there):
        raise QAdapterError(
            f"distributed_config spreads a base over {needed} processes, and this launch has "
            f"{there}: start it with torchrun --nproc_per_node {needed}"
        )
    return DistributedConfig.from_dict(dict(fields)) if isinstance(given, Mapping) else given


def require_whole_matrices_of(distributed_config: Any, what: str) -> None:
    """The same of a base that is still to be loaded; ``distributed_config`` as for ``tp_size_of``.
    """
    if tp_size_of(distributed_config) > 1:
        raise matrices_are_split(what)


def tp_size_of(given: Any) -> int:
    """Of a ``distributed_config`` that was given: transformers' own, a mapping or None. What is
    wrong with it is told where it is used."""
    size = given.get("tp_size") if isinstance(given, Mapping) else getattr(given, "tp_size", None)
    return size if type(size) is int and size > 1 else 1


def matrices_are_split(what: str) -> QAdapterError:
    return QAdapterError(
        f"{what} can't be put into a base that {TENSOR_PARALLEL} (tp_size) splits: take a head "
        "adapter (adapter_kind head), or spread the base by fsdp_size"
    )


def asks_for(size: Any) -> bool:
    """Whether a field of ``MODES`` does."""
    return size is True or (type(size) is int and size > 1)
