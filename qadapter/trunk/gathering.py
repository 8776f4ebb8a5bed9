"""Rows gathered more than once, with a gradient that is the same in every run.

PyTorch's own gradient of a gather adds rows atomically on a GPU, in whatever order. Here what was
gathered several times is folded in halves, in a fixed order.

Shapes: N rows, M gathered ones, R rows that were gathered more than once, E times in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gathering:
    """Which of N rows stand at M places."""

    rows_M: Tensor
    """int64; also at places that nothing reads."""
    first_N: Tensor
    """One place of each row."""
    shared_R: Tensor
    places_E: Tensor
    """Places of the shared rows, row by row."""
    starts_R: Tensor
    """Where in ``places_E`` each shared row's begin."""
    folds: list[tuple[Tensor, Tensor]]
    """Index into E: the second is added to the first, one level after the other."""

    @classmethod
    def of(cls, rows: np.ndarray, used: np.ndarray, count: int) -> Gathering:
        """Rows [M] of ``count``; what stands at places other than ``used`` is never read."""
        held = rows[used]
        times = np.bincount(held, minlength=count)
        first = np.empty(count, dtype=np.int64)
        first[held[::-1]] = used[::-1]
        shared = np.flatnonzero(times > 1)
        several = times[held] > 1
        places = used[several][np.argsort(held[several], kind="stable")]
        sizes = times[shared]
        starts = np.cumsum(sizes) - sizes
        number = np.arange(len(places)) - np.repeat(starts, sizes)
        left, step, folds = np.repeat(sizes, sizes) - number, 1, []
        while (into := np.flatnonzero((number % (2 * step) == 0) & (left > step))).size:
            folds.append((torch.from_numpy(into), torch.from_numpy(into + step)))
            step *= 2
        return cls(
            torch.from_numpy(rows), torch.from_numpy(first), torch.from_numpy(shared),
            torch.from_numpy(places), torch.from_numpy(starts), folds,
        )

    def total(self, gradient_M: Tensor) -> Tensor:
        """[M, ...] summed by row, [N, ...]; zero at places that nothing reads."""
        if gradient_M.device.type == "cpu":  # one after the other, and faster than folding
            total_N = gradient_M.new_zeros(len(self.first_N), *gradient_M.shape[1:])
            return total_N.index_add_(0, self.rows_M, gradient_M)
        return self.folded(gradient_M)

    def folded(self, gradient_M: Tensor) -> Tensor:
        """As ``total``: what is shared is folded in halves, in float32 at least."""
        total_N = gradient_M.index_select(0, self.first_N)
        if not len(self.shared_R):
            return total_N
        parts_E = gradient_M.index_select(0, self.places_E)
        if parts_E.dtype in (torch.float16, torch.bfloat16):
            parts_E = parts_E.float()
        for into, other in self.folds:
            sums = parts_E.index_select(0, into) + parts_E.index_select(0, other)
            parts_E.index_copy_(0, into, sums)
        sums_R = parts_E.index_select(0, self.starts_R).to(total_N.dtype)
        return total_N.index_copy_(0, self.shared_R, sums_R)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering, once: bool) -> Tensor:
        ctx.gathering, ctx.once = gathering, once
        return x.index_select(0, gathering.rows_M)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.once:
            return gradient.index_select(0, ctx.gathering.first_N), None, None
        return ctx.gathering.total(gradient), None, None


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering, ctx.places = gathering, len(x)
        return x.index_select(0, gathering.first_N)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        spread = gradient.new_zeros(ctx.places, *gradient.shape[1:])
        return spread.index_copy_(0, ctx.gathering.first_N, gradient), None


def gather(x: Tensor, gathering: Gathering, *, once: bool = False) -> Tensor:
    """[N, ...] at all places, [M, ...].

    Args:
        once: what is made of a row is read at its first place alone, so its gradient is there.
    """
    return _Gather.apply(x, gathering, once)  # type: ignore[no-untyped-call]


def pick(x: Tensor, gathering: Gathering) -> Tensor:
    """[M, ...] at each row's first place, [N, ...]."""
    return _Pick.apply(x, gathering)  # type: ignore[no-untyped-call]
