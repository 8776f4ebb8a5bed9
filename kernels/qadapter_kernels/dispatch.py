"""Which backend serves a call, and why. The only place that decides."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}
"""Backends by device type, best first; PyTorch's own kernels serve every other device."""
_MODULES = {
    "torch": "torch_backend",
    "triton": "triton",
    "cpu": "cpu_backend",
    "cuda": "cuda_backend",
}
ENVIRONMENT_VARIABLE = "QADAPTER_BACKEND"
OPERATORS = (
    "soft_value", "linear_soft_value", "linear_logsumexp", "linear_state_scores", "bradley_terry",
    "combine_logits", "sample",
)
"""What is served; the last two are decoding's."""
_ONLY_IN = {"sample": ("triton",), "linear_state_scores": ("cpu", "triton", "torch")}
"""Operators that not every backend has; elsewhere they are PyTorch's own operations."""


class BackendStatus(NamedTuple):
    """One row of ``backends()``."""

    name: str
    devices: tuple[str, ...]
    """Device types it can serve now."""
    default_for: tuple[str, ...]
    """Device types for which it is taken when nothing is forced."""
    reason: str
    """Why it is or is not there."""

    @property
    def available(self) -> bool:
        return bool(self.devices)


class Serving(NamedTuple):
    """One row of ``serving()``."""

    operator: str
    device: str
    """Device type."""
    backend: str | None
    """None: no backend has the operator for this device, and PyTorch's own operations do it."""
    is_fallback: bool
    """Something slower than the device's first choice serves."""
    reason: str


def load(name: str) -> ModuleType:
    """The backend's module. Never fails for want of hardware or of a compiled library."""
    if name not in _MODULES:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(_MODULES)}")
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def backends() -> tuple[BackendStatus, ...]:
    """Every backend: whether it is there, for which devices, and why. Needs no GPU."""
    defaults = {device: default(device).NAME for device in PREFERENCE}
    rows = []
    for name in _MODULES:
        reasons = {device: load(name).unavailable_reason(device) for device in PREFERENCE}
        devices = tuple(device for device, reason in reasons.items() if reason is None)
        home = next((d for d, names in PREFERENCE.items() if names[0] == name), None)
        reason = "ready" if devices else reasons[home or "cuda"]
        taken_for = tuple(d for d, taken in defaults.items() if taken == name and d in devices)
        if not torch.cuda.is_available():
            devices = tuple(d for d in devices if d != "cuda")
            taken_for = tuple(d for d in taken_for if d != "cuda")
        rows.append(BackendStatus(name, devices, taken_for, reason))
    return tuple(rows)


def serving(device_type: str) -> tuple[Serving, ...]:
    """Which backend serves each operator for 16-bit and float32 tensors of a device type where the
    call names none, and why. Needs no such device."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    rows = []
    for operator in OPERATORS:
        holders = _ONLY_IN.get(operator, tuple(_MODULES))
        choices = PREFERENCE.get(device_type, ("torch",))
        choices = tuple(name for name in choices if name in holders)
        if forced and "torch" in holders:  # else nothing selects among backends
            reason = load(forced).unavailable_reason(device_type)
            why = f"{ENVIRONMENT_VARIABLE} forces it"
            why += f", and it can't: {reason}" if reason else ""
            taken = forced
            if forced not in holders:
                taken, why = "torch", f"{forced} has no kernel for it ({why})"
            rows.append(Serving(operator, device_type, taken, taken != choices[0], why))
            continue
        reasons = {name: load(name).unavailable_reason(device_type) for name in choices}
        backend = next((name for name in choices if reasons[name] is None), None)
        better = choices if backend is None else choices[: choices.index(backend)]
        why = "; ".join(f"not {name}: {reasons[name]}" for name in better) or (
            "the first choice" if backend else f"no kernel for {device_type} tensors: PyTorch's own"
        )
        rows.append(Serving(operator, device_type, backend, bool(better), why))
    return tuple(rows)


def select(
    tensor: torch.Tensor, forced: str | None = None, operator: str | None = None
) -> ModuleType:
    """The backend that serves a tensor's device and dtype.

    Args:
        operator: one that not every backend has: PyTorch serves it where the one taken has not.
        forced: a backend's name (the ``backend=`` argument); else ``QADAPTER_BACKEND``; else the
            best there is for the device. float64 is served by the definition's own arithmetic.

    Raises:
        ValueError: the forced name is unknown.
        RuntimeError: the forced backend can't serve; says why.
    """
    device_type, is_double = tensor.device.type, tensor.dtype == torch.float64
    forced = forced or os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        backend = load(forced)
        reason = backend.unavailable_reason(device_type)
        if reason is None and is_double and forced != "torch":
            reason = "float64 is served by the torch backend only"
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} can't serve {device_type} tensors: {reason}")
    else:
        backend = load("torch") if is_double else default(device_type)
    holders = _MODULES if operator is None else _ONLY_IN.get(operator, _MODULES)
    return backend if backend.NAME in holders else load("torch")


def default(device_type: str) -> ModuleType:
    """The best backend there is for a device type."""
    for name in PREFERENCE.get(device_type, ()):
        backend = load(name)
        if backend.unavailable_reason(device_type) is None:
            return backend
    return load("torch")
