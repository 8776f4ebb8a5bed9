"""Finds and loads the compiled libraries (ctypes, plain C ABI).

Nothing here raises on import: a library that was not built, or can't be loaded, is a reason that
``library()`` raises and ``unavailable_reason()`` returns. ``python -m qadapter_kernels``
prints what was built and what was not.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from .reference import Coefficients

LIBRARY_FOLDER = Path(__file__).parent / "lib"

P, I64, I32, F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
MATRIX = [P, I64, I32]
"""A [N, V] matrix: data pointer, row stride in elements, dtype code."""
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

SIGNATURES: dict[str, dict[str, tuple[type | None, list[type]]]] = {
    "cpu": {
        "qadapter_cpu_interface": (I32, []),
        "qadapter_cpu_isa": (ctypes.c_char_p, []),
        "qadapter_cpu_select_isa": (I32, [ctypes.c_char_p]),
        "qadapter_cpu_exp": (None, [P, P, I64]),
        "qadapter_cpu_logits_forward": (I32, [*MATRIX, *MATRIX, P, P, P, I64, I64, P, P, I32]),
        "qadapter_cpu_logits_backward": (
            I32, [*MATRIX, *MATRIX, P, P, P, P, P, I64, I64, *MATRIX, I32]
        ),
        "qadapter_cpu_rows_forward": (
            I32, [*MATRIX, *MATRIX, P, F64, P, F64, P, P, I64, I64, I32, I32, P, P, P, I32]
        ),
        "qadapter_cpu_combine_logits": (I32, [*MATRIX, *MATRIX, P, P, I64, I64, P, I32]),
        "qadapter_cpu_score_rows": (
            I32, [P, I64, P, I64, P, P, P, P, P, I64, I64, P, I32]
        ),
        "qadapter_cpu_bradley_terry_forward": (
            None, [P, P, P, P, I64, F64, F64, I32, F64, F64, P, P, P]
        ),
        "qadapter_cpu_bradley_terry_backward": (
            None, [P, P, P, P, I64, F64, F64, I32, F64, F64, P, P, P, P, P]
        ),
    },
    "cuda": {  # every function that launches returns a cudaError_t and takes a stream, last
        "qadapter_cuda_interface": (I32, []),
        "qadapter_cuda_probe": (I32, []),
        "qadapter_cuda_error_name": (ctypes.c_char_p, [I32]),
        "qadapter_cuda_logits_forward": (
            I32, [*MATRIX, *MATRIX, P, P, P, I64, I32, P, P, P, P, P, P, I32, P, P]
        ),
        "qadapter_cuda_logits_splits": (I32, [I64, I32]),
        "qadapter_cuda_logits_backward": (
            I32, [*MATRIX, *MATRIX, P, P, P, P, P, I64, I32, *MATRIX, P]
        ),
        "qadapter_cuda_rows_forward": (
            I32, [*MATRIX, *MATRIX, P, F64, P, F64, P, P, I64, I32, I32, I32, P, P, P, P]
        ),
        "qadapter_cuda_combine_logits": (I32, [*MATRIX, *MATRIX, P, P, I64, I32, P, P]),
        "qadapter_cuda_bradley_terry_forward": (
            I32, [P, P, P, P, I64, F64, F64, I32, F64, F64, P, P, P, P, P]
        ),
        "qadapter_cuda_bradley_terry_backward": (
            I32, [P, P, P, P, I64, F64, F64, I32, F64, F64, P, P, P, P, P, P]
        ),
    },
}
"""Result and argument types of every C function, by library."""
INTERFACE = 2
"""What the libraries' ``interface`` functions say where they take the arguments above."""


class LibraryUnavailable(RuntimeError):
    """A compiled library is not there; the message says why."""


@functools.cache
def build_report() -> dict[str, dict[str, Any]]:
    """What the install built: {library: {"built": bool, "reason": why not, "compiler": ...}}."""
    try:
        report = json.loads((LIBRARY_FOLDER / "build_report.json").read_text())
    except (OSError, ValueError):
        return {}
    return cast(dict[str, dict[str, Any]], report)


def missing_reason(name: str) -> str:
    """Why the library was not built, in one line."""
    fallback = "the package was installed without compiling it"
    reason = build_report().get(name, {}).get("reason", fallback)
    return f"the compiled {name} library was not built: {reason}"


@functools.cache
def _load(name: str) -> ctypes.CDLL | str:
    path = LIBRARY_FOLDER / f"libqadapter_{name}.so"
    if not path.exists():
        return missing_reason(name)
    try:
        if name == "cpu":
            _bring_openmp()
        lib = ctypes.CDLL(str(path))
        for function, (result, arguments) in SIGNATURES[name].items():
            getattr(lib, function).restype = result
            getattr(lib, function).argtypes = arguments
    except AttributeError:
        return _other_sources(name)
    except OSError as error:
        return f"the compiled {name} library can't be loaded: {error}"
    found = getattr(lib, f"qadapter_{name}_interface")()
    return lib if found == INTERFACE else _other_sources(name)


def _bring_openmp() -> None:
    """The CPU library names no OpenMP runtime: it takes torch's, whatever its file is called, which
    is in the process for all to see, so that there is one pool of threads. A torch that was built
    without OpenMP has brought none."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        with contextlib.suppress(OSError):
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def _other_sources(name: str) -> str:
    return (
        f"the compiled {name} library was built from other sources than this Python code: install "
        "the package again (in a checkout: python setup.py build_native --inplace)"
    )


def unavailable_reason(name: str) -> str | None:
    """None if the library ("cpu" or "cuda") can be used, else why not."""
    loaded = _load(name)
    return loaded if isinstance(loaded, str) else None


def library(name: str) -> ctypes.CDLL:
    """The loaded library.

    Raises:
        LibraryUnavailable: it was not built or can't be loaded; says why.
    """
    loaded = _load(name)
    if isinstance(loaded, str):
        raise LibraryUnavailable(loaded)
    return loaded


@overload
def float32(x: Tensor) -> Tensor: ...
@overload
def float32(x: None) -> None: ...
def float32(x: Tensor | None) -> Tensor | None:
    """As the compiled libraries read what is no matrix: contiguous."""
    return None if x is None else x.to(torch.float32).contiguous()


def int64(x: Tensor) -> Tensor:
    return x.to(torch.int64).contiguous()


def doubles(coef: Coefficients) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * 4)(*coef)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def matrix(x_NV: Tensor | None) -> tuple[int | None, int, int]:
    """The three arguments of a MATRIX.

    Raises:
        TypeError: a dtype the compiled libraries don't serve.
        ValueError: not a matrix, or its columns are not contiguous.
    """
    if x_NV is None:
        return None, 0, 0
    if x_NV.dtype not in DTYPE_CODES:
        raise TypeError(f"compiled kernels take float32, bfloat16 or float16, not {x_NV.dtype}")
    if x_NV.ndim != 2 or (x_NV.shape[1] > 1 and x_NV.stride(1) != 1):
        raise ValueError(
            f"expected a matrix with contiguous columns, got shape {tuple(x_NV.shape)} "
            f"and strides {x_NV.stride()}"
        )
    return x_NV.data_ptr(), x_NV.stride(0), DTYPE_CODES[x_NV.dtype]


HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14


def prefer_huge_pages(x: Tensor) -> Tensor:
    """Asks Linux to back a fresh CPU tensor with pages of 2 MiB where it can, and returns it.

    A page costs at its first touch, 512 times less often so: the first use of 50 MB took 45 ms with
    pages of 4 KiB and 15 with these (2 cores of an EPYC under KVM). Only advice: no effect on
    values, and none at all where the system has no such pages.
    """
    madvise = _madvise()
    begin = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (x.data_ptr() + x.nbytes) // HUGE_PAGE * HUGE_PAGE
    if madvise is not None and end > begin:
        madvise(begin, end - begin, MADV_HUGEPAGE)
    return x


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = [P, ctypes.c_size_t, I32]
    return madvise


def instruction_set() -> str:
    """The CPU kernels in use: "portable", "avx2" or "avx512"."""
    name: bytes = library("cpu").qadapter_cpu_isa()
    return name.decode()


def describe(name: str) -> str:
    """One line: what the library ("cpu" or "cuda") holds code for, or why it can't be used."""
    if reason := unavailable_reason(name):
        return reason
    report = build_report().get(name, {})
    code = ", ".join(report.get("targets") or report.get("instruction_sets") or ["unknown targets"])
    if name == "cpu":
        code += f"; here {instruction_set()} is taken"
    return f"code for {code}; built with {report.get('compiler', 'an unknown compiler')}"
