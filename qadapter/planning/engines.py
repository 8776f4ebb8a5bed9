"""Ways to lay a run out on GPUs, and which one to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from qadapter.planning.costs import Costs, Run, costs_of, steps_of
from qadapter.planning.lengths import Lengths
from qadapter.planning.machines import BETWEEN_NODES, DISK, Machine
from qadapter.planning.shapes import Shape, Trained
from qadapter.training import checks
from qadapter.training.config import QAdapterConfig

_ROOM = 0.92
"""Of a device's memory: allocators leave gaps, and libraries take some."""


class Engine(NamedTuple):
    """One way, and what it takes on each device."""

    name: str
    shards: int
    """Processes that share one copy of the base."""
    processes: int
    parts: dict[str, float]
    """Name → bytes on one device."""
    room: float
    """Bytes a device has for them."""
    step_seconds: float
    """Of an optimizer step, on all processes."""
    read_seconds: float
    """Of the base's one reading of all pairs."""
    steps: int
    bound_by: str
    """What a step waits for."""
    disk_seconds: float
    """Of reading a step's features on a node, where they are on a disk and not in its cache."""

    @property
    def needs(self) -> float:
        """Bytes on one device."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.needs <= self.room

    @property
    def seconds(self) -> float:
        return self.read_seconds + self.steps * self.step_seconds


class Plan(NamedTuple):
    """A run on a machine, all ways that there are."""

    shape: Shape
    trained: Trained
    costs: Costs
    ways: list[Engine]

    @property
    def chosen(self) -> Engine | None:
        """The way to take; None: none fits."""
        return choose(self.ways)


def plan_of(
    base: PreTrainedModel, lengths: Lengths, config: QAdapterConfig, machine: Machine,
    dtype: torch.dtype | None = None,
) -> Plan:
    """What training the adapter that ``config`` describes takes.

    Args:
        base: its modules, on whatever device. dtype: as for ``Shape.of``.

    Raises:
        QAdapterError: a base or an adapter that can't be planned.
    """
    shape, trained = Shape.of(base, dtype), Trained.of(base, config.adapter_config(base))
    checkpointing = trained.first_block is not None and any(
        getattr(config, name, None) for name in checks.CHECKPOINTING
    )
    costs = costs_of(shape, trained, lengths, Run.of(config, checkpointing), machine.cpu)
    return Plan(shape, trained, costs, engines(shape, costs, lengths, config, machine))


def engines(
    shape: Shape, costs: Costs, lengths: Lengths, config: QAdapterConfig, machine: Machine
) -> list[Engine]:
    """Every way there is: a base on every device, or a base sharded (FSDP2) over the devices of a
    node, of several nodes, of all."""
    counts = [1]
    if machine.devices > 1:
        counts += [machine.per_node * nodes for nodes in range(1, machine.nodes + 1)
                   if machine.nodes % nodes == 0 and machine.per_node * nodes > 1]
    return [_engine(shards, shape, costs, lengths, config, machine) for shards in counts]


def choose(ways: Sequence[Engine]) -> Engine | None:
    """Of those that fit the one that is done first; of like ones the simpler. None: none fits."""
    fitting = [way for way in ways if way.fits]
    if not fitting:
        return None
    least = min(way.seconds for way in fitting)
    return next(way for way in fitting if way.seconds <= 1.1 * least)


def smallest(
    shape: Shape, costs: Costs, lengths: Lengths, config: QAdapterConfig, machine: Machine
) -> Machine | None:
    """So many nodes of these GPUs that a way fits; None: not on a thousand of them."""
    for doubled in range(11):
        larger = machine._replace(nodes=machine.nodes << doubled)
        if choose(engines(shape, costs, lengths, config, larger)) is not None:
            return larger
    return None


def _engine(
    shards: int, shape: Shape, costs: Costs, lengths: Lengths, config: QAdapterConfig,
    machine: Machine,
) -> Engine:
    device, processes = machine.device, machine.devices
    link = device.link if shards <= machine.per_node else min(device.link, BETWEEN_NODES)
    parts = {
        "the base's weights": costs.weights / shards,
        "gathered at a time": costs.in_flight if shards > 1 else 0.0,
        "adapter and its Adam": costs.adapter,
        "kept for the backward pass": costs.activations,
        "logits at a time, states": costs.head,
    }
    computed = costs.step.seconds(device.flops)
    micro = {
        "products": computed, "memory": costs.read / device.bandwidth,
        "the network": costs.gathered * (shards - 1) / shards / link,
    }
    bound_by = max(micro, key=lambda name: micro[name])
    # One batch of the reading at a time, behind each the next blocks' weights.
    batch = math.ceil(lengths.pairs * lengths.tokens / config.feature_batch_tokens / processes)
    trunk = shape.depth * shape.block * shape.itemsize
    reading = max(
        costs.reading.seconds(device.flops) * lengths.pairs / processes,
        batch * trunk * max(1 / device.bandwidth, (shards - 1) / shards / link),
    ) if costs.reading.trunk else 0.0
    return Engine(
        _name(shards, machine), shards, processes, parts, _ROOM * device.memory,
        micro[bound_by] * config.gradient_accumulation_steps, reading,
        steps_of(lengths, config, processes), bound_by,
        costs.features * config.per_device_train_batch_size * config.gradient_accumulation_steps
        * machine.per_node / DISK,
    )


def _name(shards: int, machine: Machine) -> str:
    if machine.devices == 1:
        return "one process"
    if shards == 1:
        return "a base on every GPU"
    if shards == machine.devices:
        return f"one base sharded over {shards} GPUs"
    return f"{machine.devices // shards} bases, each sharded over {shards} GPUs"
