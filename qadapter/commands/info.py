"""``qadapter info``: versions, devices, the base models at hand, which kernels are taken, and what
the compiled libraries hold."""

from __future__ import annotations

import os

import torch
from rich.table import Table

from qadapter.console.environment import devices, versions
from qadapter.console.terminal import Terminal
from qadapter.system.caches import cache_dir
from qadapter_kernels import backends, native, serving
from qadapter_kernels.dispatch import ENVIRONMENT_VARIABLE


def run() -> None:
    """Print it all."""
    console = Terminal()
    console.print(_table("versions", ("package", "version"), [
        (name, version or "not installed") for name, version in versions().items()
    ]))
    console.print(_table("devices", ("device", "what it is"), list(devices().items())))
    console.print(_table("kernels", ("backend", "serves", "taken for", "why"), [
        (b.name, ", ".join(b.devices) or "—", ", ".join(b.default_for) or "—", b.reason)
        for b in backends()
    ]))
    console.print(_table("compiled libraries", ("library", "what it holds"), [
        (name, native.describe(name)) for name in native.SIGNATURES
    ]))
    console.print(_table("operators", ("operator", "on", "served by", "why"), [
        (s.operator, s.device, s.backend or "PyTorch", s.reason)
        for device in _device_types() for s in serving(device)
    ]))
    if forced := os.environ.get(ENVIRONMENT_VARIABLE):
        console.print(f"{ENVIRONMENT_VARIABLE}={forced} forces this backend", highlight=False)
    folder = cache_dir() / "models"
    models = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    console.print(_table(f"base models in {folder}", ("model", "size"), [
        (path.name, f"{sum(f.stat().st_size for f in path.rglob('*')) / 2**20:,.0f} MiB")
        for path in models
    ] or [("none yet", "—")]))


def _device_types() -> list[str]:
    """Of this machine, the CPU last."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [*([accelerator.type] if accelerator else []), "cpu"]


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
