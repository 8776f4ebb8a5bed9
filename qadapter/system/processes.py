"""The end of processes that worked together."""

from __future__ import annotations

import gc
import time

import torch.distributed as dist

_MOMENT = 0.1
"""Seconds; a thread that waits for the interpreter needs microseconds of it."""


def leave_group() -> None:
    """Leaves the processes of a run, if there are any, as the last thing that is done in one.

    A thread of gloo's that still holds a tensor when the interpreter ends aborts the process (torch
    2.13; "terminate called without an active exception"): all work done, and an exit code that says
    otherwise. The threads end with the last reference to their group, which cycles of a trainer and
    its model keep, and torch's own caches of sharded tensors for good: those get a moment to let go
    of what they hold.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
        time.sleep(_MOMENT)
