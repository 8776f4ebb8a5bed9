"""Launching: tile sizes, legal warp counts, the number of programs that fills a device."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

DEFAULT_PROCESSORS = 132
"""Streaming multiprocessors assumed where there is no GPU to ask (an H100 SXM has 132)."""
MAX_SPLITS = 64
"""Programs one row may be split over: a combining program holds one value of each in a tile."""
VECTOR_BYTES = 16
"""The widest load of one thread."""


class Tile(NamedTuple):
    columns: int
    """Columns of a row a program takes at a time. A power of two."""
    warps: int
    """Of 32 threads; ``legal_warps`` translates for devices whose warps are wider."""


# Streaming kernels keep ~16 KB of each stream in flight per program and several programs a
# multiprocessor: 8 warps of <= 64 registers leave room for four. The row kernel and the sampler
# walk a row more than once and want its later passes to hit L2: 32 warps are a whole
# multiprocessor, so one row is in flight on each (132 × 256 KB of bf16 fit in 50 MB).
TILES = {
    "soft_value_forward": Tile(4096, 8),
    "soft_value_backward": Tile(4096, 8),
    "rows": Tile(8192, 32),
    "bradley_terry": Tile(1024, 8),
    "combine": Tile(4096, 8),
    "sample": Tile(4096, 32),
}


def launch(kernel, grid: tuple[int], *args, warps: int, **constants) -> None:
    """Run ``kernel`` on the device of its first tensor, whatever device is current.

    The grid has one dimension everywhere: y and z end at 65,535 programs, x does not.
    """
    tensor = next(x for x in args if isinstance(x, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*args, num_warps=legal_warps(warps, warp_size()), **constants)


def legal_warps(warps: int, warp_size: int) -> int:
    """The same number of threads in warps of another width (a block ends at 1,024 threads)."""
    return max(1, warps * 32 // warp_size)


@cache
def warp_size() -> int:
    return 64 if torch.version.hip else 32


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def vector(*tensors: Tensor | None) -> int:
    """Columns one thread takes at a time: 16 bytes of the widest of the tensors it reads."""
    return VECTOR_BYTES // max(x.element_size() for x in tensors if x is not None)


class Split(NamedTuple):
    """How many programs share a row, and how many tiles each of them walks."""

    programs: int
    tiles_each: int


def split_rows(num_rows: int, num_columns: int, tile: Tile, device: torch.device) -> Split:
    """One program a row, unless there are too few rows to give every multiprocessor two.

    A power of two, so that the shapes of a decoding batch share their compiled kernels. The
    order of a row's sums depends on the split, so on the number of rows, and on nothing else.
    """
    tiles = triton.cdiv(num_columns, tile.columns)
    wanted = 2 * processors(device) // max(1, num_rows)
    if wanted < 2 or tiles < 2:
        return Split(1, tiles)
    tiles_each = triton.cdiv(tiles, min(triton.next_power_of_2(wanted), MAX_SPLITS))
    return Split(triton.cdiv(tiles, tiles_each), tiles_each)


def check_rows(name: str, x_NV: Tensor) -> None:
    """Kernels walk columns one by one; rows may be anywhere."""
    if x_NV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: Triton kernels take float32, bfloat16 or float16, not {x_NV.dtype}")
    if x_NV.ndim != 2 or (x_NV.shape[1] > 1 and x_NV.stride(1) != 1):
        raise ValueError(f"{name}: want [rows, columns] with adjacent columns, "
                         f"got shape {tuple(x_NV.shape)}, strides {x_NV.stride()}")
