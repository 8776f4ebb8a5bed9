"""How much memory and disk space this process may still take."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

_NO_LIMIT = 1 << 60
"""Control groups of the first version write a number near 2**63 for none."""


def available_memory() -> int:
    """Bytes that can be taken before the machine, the container (control groups of both versions)
    or a limit of the process (ulimit) is exhausted. Files that are only cached count as free."""
    rooms = [psutil.virtual_memory().available, *_control_groups(Path("/"))]
    used = psutil.Process().memory_info()
    for limit, taken in (
        (resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0)),
    ):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            rooms.append(soft - taken)
    return max(0, min(rooms))


def free_disk(folder: str | Path) -> int:
    """Bytes free where a folder is, or would be made.

    Raises:
        OSError: no part of the path can be looked at.
    """
    folder = Path(folder).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_writable(folder: str | Path) -> None:
    """Make a folder and write to it. Only writing tells: permissions alone don't (root, read-only
    mounts, /sys).

    Raises:
        OSError: it can't be made or written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def size(num_bytes: float) -> str:
    """As people read it: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"


def _control_groups(root: Path) -> Iterator[int]:
    """What is left in each group this process is in, and in those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        limits: tuple[str, ...]
        if controllers == "":  # version 2
            top, limits = root / "sys/fs/cgroup", ("memory.max", "memory.high")
            usage, cached = "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limits = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes",)
            usage, cached = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        # A container may see its own group as the top, under the host's name for it.
        for place in dict.fromkeys((group, *group.parents)):
            if place == top or top in place.parents:
                yield from _left(place, limits, usage, cached)


def _left(group: Path, limits: tuple[str, ...], usage: str, cached: str) -> Iterator[int]:
    found = [int(text) for name in limits if (text := _read(group / name)).isdigit()]
    limit, used = min(found, default=_NO_LIMIT), _read(group / usage)
    if limit < _NO_LIMIT and used.isdigit():
        stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
        yield limit - int(used) + int(stat.get(cached, 0))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
