"""The CUDA kernels' own source, compiled for the CPU, behind ``cuda_backend``.

kernels/csrc/cuda/emulator.hpp says what this shows and what only a GPU can.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qadapter_kernels import cuda_backend, native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels/csrc/cuda"


def find_nvcc() -> str | None:
    """As setup.py finds it."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


@functools.cache
def library() -> ctypes.CDLL:
    """Built once for each state of the sources, whichever test process comes first."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found: the kernels' sources need the toolkit's headers")
    suffixes = (".cu", ".cuh", ".hpp", ".cpp")
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in suffixes)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    path = ROOT / f"build/cuda_emulator/{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_suffix(f".{os.getpid()}")
        subprocess.run(  # a .cpp: nvcc hands it to the host compiler, with the toolkit's headers
            [nvcc, "-std=c++17", "-O1", "-shared", "-cudart=none",
             "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror,-Wno-unknown-pragmas",
             str(SOURCES / "emulator.cpp"), "-o", str(mine)],
            check=True,
        )
        mine.replace(path)
    lib = ctypes.CDLL(str(path))
    for name, (result, arguments) in native.SIGNATURES["cuda"].items():
        if hasattr(lib, name):
            getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    lib.qadapter_emulator_cluster_launches.restype = ctypes.c_longlong
    return lib


def _launch(kernel: str, like, *arguments) -> None:
    status = getattr(library(), f"qadapter_cuda_{kernel}")(*arguments, None)
    if status != 0:
        raise RuntimeError(f"CUDA kernel {kernel} failed in the emulator: error {status}")


def splits(x_NV) -> int:
    return library().qadapter_cuda_logits_splits(*x_NV.shape)


@contextlib.contextmanager
def emulated(threads: int = 64, order: int = 0, clusters: bool = False) -> Iterator[None]:
    """``backend="cuda"`` serves CPU tensors, with blocks of at most ``threads`` threads that the
    scheduler takes in ``order``: 0 ascending, 1 descending, else shuffled with that seed."""
    library().qadapter_emulator_options(threads, order, int(clusters))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_backend, "_launch", _launch)
        patch.setattr(cuda_backend, "_splits", splits)
        patch.setattr(cuda_backend, "unavailable_reason", lambda device_type: None)
        yield


def cluster_launches() -> int:
    return library().qadapter_emulator_cluster_launches()
