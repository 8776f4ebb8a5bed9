"""Launching: tile sizes, legal warp counts, the number of programs that fills a device."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

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


# Streaming kernels keep 8 KB of each 16-bit stream in flight a program, and 8 warps of at most 64
# registers leave room for four programs a multiprocessor. The row kernel and the sampler walk a row
# more than once and want the later passes to hit L2: with 32 warps a row at most two rows are in
# flight on a multiprocessor (264 × 256 KB of bf16 against 50 MB: with 8 warps it would be eight).
# Reasoned, not tuned: no GPU has run these yet (registers: benchmarks/results).
TILES = {
    "soft_value_forward": Tile(4096, 8),
    "soft_value_backward": Tile(4096, 8),
    "rows": Tile(8192, 32),
    "bradley_terry": Tile(1024, 8),
    "combine": Tile(4096, 8),
    "sample": Tile(4096, 32),
    "scores": Tile(2048, 8),
}


def launch(kernel: Any, grid: tuple[int], *args: Any, warps: int, **constants: Any) -> None:
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


def lanes(tile: Tile, *rows_NV: Tensor | None) -> dict[str, int | bool]:
    """The constants of ``device.tile_columns``: a lane takes 16 bytes of the widest of the tensors
    that are read. Aligned is what Triton can prove for the loads to be one instruction: addresses,
    strides and the number of columns (it ends the masks) all divisible by 16."""
    tensors = [x for x in rows_NV if x is not None]
    vec = VECTOR_BYTES // max(x.element_size() for x in tensors)
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 for x in tensors
    )
    return dict(LANES=tile.columns // vec, VEC=vec, ALIGNED=aligned)


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
        raise TypeError(f"{name}: want float32, bfloat16 or float16, not {x_NV.dtype}")
    if x_NV.ndim != 2 or (x_NV.shape[1] > 1 and x_NV.stride(1) != 1):
        raise ValueError(f"{name}: want [rows, columns] with adjacent columns, "
                         f"got shape {tuple(x_NV.shape)}, strides {x_NV.stride()}")
