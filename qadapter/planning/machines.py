"""GPUs by name, and this machine."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import torch

from qadapter.errors import QAdapterError, nearest
from qadapter.system.room import available_memory
from qadapter.trunk.base_dtype import rates_of_width

GIB = 2**30


class Device(NamedTuple):
    """One GPU, by its data sheet; memory as CUDA tells it."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense products of 16-bit numbers, a second."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To the other GPUs of its node, bytes a second each way."""


def _gpu(name: str, gib: float, tflops: float, tb: float, link_gb: float) -> Device:
    return Device(name, gib * GIB, tflops * 1e12, tb * 1e12, link_gb * 1e9)


GPUS = {
    gpu.name: gpu for gpu in (
        _gpu("A100-40", 39.4, 312, 1.555, 300), _gpu("A100", 79.1, 312, 2.04, 300),
        _gpu("H100", 79.1, 989, 3.35, 450), _gpu("H100-PCIe", 79.1, 756, 2.0, 50),
        _gpu("H200", 139.8, 989, 4.8, 450), _gpu("B200", 178.4, 2250, 8.0, 900),
        _gpu("B300", 267.0, 2250, 8.0, 900), _gpu("L40S", 44.4, 362, 0.864, 25),
        _gpu("L4", 22.0, 121, 0.3, 25), _gpu("A10G", 22.0, 70, 0.6, 12),
        _gpu("RTX3090", 23.6, 71, 0.936, 12), _gpu("RTX4090", 23.5, 165, 1.008, 25),
        _gpu("RTX5090", 31.4, 210, 1.792, 50), _gpu("MI300X", 191.5, 1307, 5.3, 448),
    )
}
BETWEEN_NODES = 50e9
"""Bytes a second each way that a GPU has to other nodes: 400 Gbit/s."""
DISK = 3e9
"""Bytes a second that a node's disk is read with: one of flash."""


class Machine(NamedTuple):
    """Nodes of like GPUs; or one CPU."""

    device: Device
    per_node: int = 1
    nodes: int = 1
    cpu: bool = False

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        if self.cpu:
            return "this CPU"
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.per_node}x{self.device.name}"


def machine_of(text: str) -> Machine:
    """``8xH100``, ``H200``, ``4x8xB200`` (nodes, GPUs of each, kind).

    Raises:
        QAdapterError: it doesn't read so, or the kind is not known.
    """
    found = re.fullmatch(r"(?:(\d{1,5})x)?(?:(\d{1,3})x)?([A-Za-z][\w-]*)", text.strip())
    if found is None:
        raise QAdapterError(f"gpus must read 8xH100, or 2x8xH100 for two nodes, got {text!r}")
    first, second, kind = found.groups()
    known = {name.lower(): gpu for name, gpu in GPUS.items()}
    if kind.lower() not in known:
        raise QAdapterError(
            f"gpus: {kind} is not known, these are: {', '.join(GPUS)}" + nearest(kind, GPUS)
        )
    counts = [int(count) for count in (first, second) if count is not None]
    if 0 in counts:
        raise QAdapterError(f"gpus: {text} is none")
    nodes, per_node = (1, 1, *counts)[-2:]
    return Machine(known[kind.lower()], per_node, nodes)


def this_machine(width: int, itemsize: int) -> Machine:
    """The GPUs that torch sees, as far as their kind is known; else this CPU, whose product is
    timed.

    Args:
        width: of the model. itemsize: bytes of its numbers.

    Raises:
        QAdapterError: GPUs of a kind that is not known.
    """
    if not torch.cuda.is_available():
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        rate = rates_of_width(width)[dtype] * torch.get_num_threads()
        return Machine(Device("CPU", available_memory(), rate, 2e10, 1e9), cpu=True)
    said = torch.cuda.get_device_name(0)
    words = re.split(r"[\s-]+", said)
    words += [first + second for first, second in itertools.pairwise(words)]  # RTX 4090
    likely = [gpu for gpu in GPUS.values() if set(words) >= set(gpu.name.split("-"))]
    if not likely:
        raise QAdapterError(f"{said} is not known here: name the like of it, as --gpus 8xH100")
    memory = torch.cuda.mem_get_info(0)[1]
    device = max(likely, key=lambda gpu: gpu.name.count("-"))._replace(memory=memory)
    return Machine(device, torch.cuda.device_count())
