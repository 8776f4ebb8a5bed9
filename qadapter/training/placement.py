"""Where the base's features are kept: decided from token counts before anything runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from qadapter.errors import QAdapterError
from qadapter.system.room import size

_SHARE = 0.5
"""Of the available memory that features take unasked: training needs some too."""
_WAYS_OUT = (
    "take cache_features none (the base runs at every step), fewer pairs or a lower max_length"
)


class DiskRoom(NamedTuple):
    """In bytes."""

    folder: str
    free: int
    to_write: int
    """Of the features, what is not there yet."""


class Placement(NamedTuple):
    where: str
    """"memory" or "disk"."""
    reason: str
    """One line, with the numbers."""


def place(
    wanted: str, needed: int, memory: int, disk: Callable[[], DiskRoom], processes: int = 1
) -> Placement:
    """Memory if it has ample room, else disk if that has; or where the user wants them. Several
    processes read one copy from a disk, and share the work of writing it: there disk comes first.

    Args:
        wanted: "auto", "memory" or "disk".
        needed: bytes of all features. processes: of this machine, each with a copy in memory.
        memory: bytes available.
        disk: looks at the folder of features; called only if they may go there.

    Raises:
        QAdapterError: they don't fit; names ``cache_features`` and the numbers.
    """
    copies = needed * processes
    numbers = f"the base's features take {size(copies)}, {size(memory)} of memory are available"
    if wanted == "memory" and copies > memory:
        raise QAdapterError(f"cache_features memory: {numbers}; take auto or disk, or {_WAYS_OUT}")
    fits = copies <= _SHARE * memory
    if wanted == "auto" and fits and processes > 1:
        with contextlib.suppress(QAdapterError):  # a folder that can't be written
            room = disk()
            if room.to_write <= room.free:
                return Placement("disk", f"the base's features take {size(needed)}: kept on disk, "
                                 f"once for {processes} processes ({room.folder})")
    if wanted == "memory" or (wanted == "auto" and fits):
        return Placement("memory", f"{numbers}: kept in memory")
    room = disk()
    on_disk = f"{size(room.free)} are free at {room.folder}"
    if room.to_write > room.free:
        raise QAdapterError(
            f"cache_features {wanted}: {numbers}, {on_disk}; name a feature_cache_dir with more "
            f"room, or {_WAYS_OUT}"
        )
    return Placement("disk", f"{numbers}: kept on disk ({on_disk})")
