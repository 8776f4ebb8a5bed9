"""How the Triton tests run: compiled where there is a GPU, else in Triton's interpreter.

``TRITON_INTERPRET`` counts when triton and the kernels are imported, once a process, and other
tests' imports reach triton too (torch._dynamo does). So ``tests/conftest.py`` sets it, before any
test module is imported and in every pytest-xdist worker alike, and this module, which every
``test_triton_*`` imports first, makes sure of it. Tests that need the compiler all the same start a
process of their own (``test_triton_aot``).
"""

from __future__ import annotations

import inspect
import os
import sys

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
TILE_COLUMNS = 512

if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "triton" in sys.modules:
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(sys.modules["triton"].language.sum, InterpretedFunction):
            raise RuntimeError(
                "triton was imported before TRITON_INTERPRET was set, which tests/conftest.py does "
                "before any import: run with TRITON_INTERPRET=1 in the environment"
            )

interpreter_only = pytest.mark.skipif(
    not INTERPRETED, reason="CPU tensors need Triton's interpreter, which this process is without"
)
# The interpreter computes with NumPy, which warns of the log(0) and inf − inf that kernels select
# away afterwards.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an autouse fixture: tiles so small that a vocabulary the interpreter can bear has several
    and rows get split, and a bfloat16 that rounds as hardware does."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    from qadapter_kernels.triton import launch

    for name in launch.TILES:
        monkeypatch.setitem(launch.TILES, name, launch.Tile(TILE_COLUMNS, 4))

    convert = interpreter._convert_float

    def convert_float(x, source, target, rounding_mode):
        """The interpreter truncates float32 to bfloat16; every GPU rounds to nearest even."""
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(x))
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.left_shift(x, 16, dtype=np.uint32)
        return convert(x, source, target, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    speed_up(monkeypatch)


def speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter look for what it replaces in Triton's language once. Its own way goes
    through whole packages whenever a kernel calls a function, half the time of a launch, to find
    that all is replaced."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builtins = {
        package: [(n, x) for n, x in inspect.getmembers(package) if tl.core.is_builtin(x)]
        for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    }

    def patch_builtin(package, *rest):
        for name, builtin in builtins[package]:
            if getattr(package, name) is builtin:
                interpreter._patch_attr(package, name, builtin, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", patch_builtin)


def on_device(*tensors):
    """Copies on the device under test; None stays None."""
    return tuple(None if x is None else x.to(DEVICE, copy=True) for x in tensors)
