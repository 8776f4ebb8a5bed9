"""What a launch or a recipe asks of engines that shard a model, and what of it is done here.

Only an adapter is trained. What DeepSpeed's ZeRO-1 and ZeRO-2 share out among processes (the
optimizer's state, gradients) is the adapter's and small: such runs are plain data parallelism. A
base is shared out while it is loaded (``qadapter.trunk.sharding``); what does it afterwards is
refused, before anything is loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.errors import QAdapterError, listed, shown
from qadapter.system.documents import read_json

if TYPE_CHECKING:
    from qadapter.training.config import QAdapterConfig

SHARDED = (
    'a base is sharded while it is loaded: model_init_kwargs {"distributed_config": {"fsdp_size": '
    "N}}, started by torchrun with N processes"
)
"""The way out where something else would shard the model."""
_USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_UNTOUCHED = ("zero_optimization", "steps_per_print", "wall_clock_breakdown")
"""Sections of a DeepSpeed configuration that change no number of data parallelism."""


def settle(args: QAdapterConfig) -> None:
    """Before transformers sees the options, and what ``accelerate launch`` has put into the
    environment: DeepSpeed would be set up for the whole process.

    Raises:
        QAdapterError: FSDP1, accelerate's FSDP2, ZeRO-3, or a DeepSpeed configuration that asks for
            more than data parallelism; names it and the way out.
    """
    launched = _is_on("ACCELERATE_USE_FSDP")
    if args.fsdp or launched:
        fsdp = args.fsdp_config if isinstance(args.fsdp_config, Mapping) else {}
        version = os.environ.get("FSDP_VERSION", "1") if launched else fsdp.get("version", 1)
        raise QAdapterError(
            f"fsdp: accelerate's FSDP{version} shards a model after it is loaded, which can't be "
            f"honoured: {SHARDED}"
        )
    config = _deepspeed(args)
    if config is None:
        return
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if stage not in (0, 1, 2):
        raise QAdapterError(f"deepspeed: ZeRO-{stage} can't be honoured: {SHARDED}")
    if asked := [name for name, x in config.items() if name not in _UNTOUCHED and _asks(x)]:
        raise QAdapterError(
            f"deepspeed: {listed(asked, 3)} can't be honoured: leave it to the training arguments "
            '("auto")'
        )
    args.deepspeed = None
    os.environ.pop(_USE_DEEPSPEED, None)
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning(
            "deepspeed: ZeRO-%s is run as plain data parallelism: what it shares out is the "
            "adapter's, and small", stage,
        )


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _deepspeed(args: QAdapterConfig) -> Mapping[str, Any] | None:
    """DeepSpeed's configuration, of an option or of a launch; None without DeepSpeed."""
    config: Any = args.deepspeed
    if not config:
        if not _is_on(_USE_DEEPSPEED):
            return None
        config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if config is None:
            stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
            return {"zero_optimization": {"stage": int(stage) if stage.isdigit() else stage}}
    if isinstance(config, (str, Path)):
        try:
            config = read_json(config)
        except QAdapterError as error:
            raise QAdapterError(f"deepspeed: {error}") from error
    if not isinstance(config, Mapping):
        raise QAdapterError(f"deepspeed must name a JSON file of settings, got {shown(config)}")
    return config


def _asks(value: Any) -> bool:
    """Whether a section of a DeepSpeed configuration says anything of its own."""
    if not isinstance(value, Mapping):
        return value not in ("auto", None, False)
    if "enabled" in value:
        return _asks(value["enabled"])
    return any(map(_asks, value.values()))
