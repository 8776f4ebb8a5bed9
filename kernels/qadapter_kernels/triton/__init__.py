"""The Triton backend: NVIDIA GPUs first, AMD's kept compiling, the interpreter for tests.

One file a kernel family; ``device`` holds the functions kernels share, ``launch`` the launches.
This module imports no triton: asking why the backend is not there has to work without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

NAME = "triton"

_HOMES = {
    "logits_forward": "soft_value",
    "logits_backward": "soft_value",
    "rows_forward": "rows",
    "bradley_terry_forward": "bradley_terry",
    "bradley_terry_backward": "bradley_terry",
    "combine_logits": "decoding",
    "sample": "sampling",
    "score_rows": "scores",
}
__all__ = ["NAME", "unavailable_reason", *sorted(_HOMES)]


def unavailable_reason(device_type: str) -> str | None:
    """None where tensors of this device type can be served, else one sentence that says why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Linux)"
    if device_type == "cuda":
        return None if torch.cuda.is_available() else "PyTorch sees no CUDA or ROCm GPU"
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
            return None
        return "Triton serves a CPU only in its interpreter, for tests (TRITON_INTERPRET=1)"
    return f"Triton has no {device_type} backend here"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
