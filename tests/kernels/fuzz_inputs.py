"""What a trial of ``fuzz`` draws, and the backends it is tried on."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator

import interpreter  # first: it decides how triton is imported
import pytest
import torch
from cases import COEFFICIENTS
from cuda_emulator import emulated, find_nvcc
from rows import guarded
from torch import Tensor

from qadapter_kernels import Coefficients, dispatch

INF, NAN = torch.inf, torch.nan
ISAS = ("portable", "avx2", "avx512")
ALL = ("torch", "cpu", "cuda", "triton")


@contextlib.contextmanager
def on_cpu(isa: str) -> Iterator[None]:
    cpu = dispatch.load("cpu")
    cpu.select_instruction_set(isa)
    try:
        yield
    finally:
        cpu.select_instruction_set("best")


@contextlib.contextmanager
def on_triton() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        interpreter.prepare(patch)
        yield


def served(rng: random.Random, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(label, backend) of all that serve CPU tensors here, each while it can be called."""
    if "torch" in names:
        yield "torch", "torch"
    if "cpu" in names and dispatch.load("cpu").unavailable_reason("cpu") is None:
        for isa in ISAS:
            try:
                with on_cpu(isa):
                    yield f"cpu, {isa}", "cpu"
            except ValueError as error:  # this processor lacks it
                if "no kernels for instruction set" not in str(error):
                    raise
    if "cuda" in names and find_nvcc() is not None:
        threads, order = rng.choice((32, 64, 96)), rng.randrange(9)
        clusters = rng.random() < 0.5
        with emulated(threads, order, clusters):
            yield f"cuda, {threads} threads, order {order}, clusters {clusters}", "cuda"
    if "triton" in names and interpreter.INTERPRETED:
        with on_triton():
            yield "triton", "triton"


class Draw:
    """Everything random of one trial."""

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def choice(self, *options):
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def shape(self) -> tuple[int, int]:
        vocab = self.choice(1, 2, 7, 8, 16, 33, 130, 511, 512, 520, 1037, 1100, 2064)
        if self.chance(0.03):
            vocab = self.choice(8191, 8200, 9001, 17_000)
        return self.rng.randint(1, 6), vocab

    def logits(self, rows: int, vocab: int, dtype: torch.dtype, plus_infinity: bool) -> Tensor:
        """[rows, vocab] of any offset, alignment and stride, in a buffer of NaN, with rows that
        hold what no good model puts out."""
        x = self.choice(0.1, 4.0, 30.0) * self.normal(rows, vocab)
        offset = self.choice(0.0, 0.0, 1e3, 1e4, -1e4)
        x += offset * torch.ones(rows, 1) if self.chance(0.7) else offset * self.normal(rows, 1)
        patterns = ["plain"] * 8 + ["some", "most", "nothing", "one NaN", "NaN", "NaN and −inf",
                                    "ties"]
        for row in x:
            pattern = self.choice(*patterns, *(["inf"] if plus_infinity else []))
            some = torch.rand(vocab, generator=self.generator)
            if pattern in ("some", "NaN and −inf"):
                row[some < 0.4] = -INF
            if pattern == "most":
                row[some < 0.98] = -INF
            if pattern == "nothing":
                row[:] = -INF
            if pattern == "NaN":
                row[:] = NAN
            if pattern in ("one NaN", "NaN and −inf"):
                row[self.rng.randrange(vocab)] = NAN
            if pattern == "inf":
                row[self.rng.randrange(vocab)] = INF
            if pattern == "ties":
                row[:] = row[:1]
        stride = vocab + self.choice(0, 0, 1, 8, 13)
        return guarded(x.to(dtype), stride, self.choice(0, 0, 1, 3, 8))

    def actions(self, rows: int, vocab: int) -> Tensor:
        actions = torch.randint(vocab, (rows,), generator=self.generator)
        for i in range(rows):
            actions[i] = self.choice(int(actions[i]), int(actions[i]), 0, vocab - 1, -1)
        return actions

    def upstream(self, rows: int) -> Tensor:
        x = self.normal(rows)
        x[torch.rand(rows, generator=self.generator) < 0.2] = 0.0
        return self.normal(1).expand(rows) if self.chance(0.2) else x

    def coefficients(self) -> Coefficients:
        def size() -> float:
            return 10.0 ** self.rng.uniform(-8, 4) if self.chance(0.8) else self.choice(1e-20, 1e-3)

        alpha_0, alpha_tilde = self.choice(0.0, 1.0, size()), self.choice(1.0, 0.5, size())
        return self.choice(
            *COEFFICIENTS.values(),
            Coefficients(alpha_0, alpha_tilde, alpha_tilde, -alpha_0),
            Coefficients(alpha_0, alpha_tilde, 1.0, 0.0),
            Coefficients(self.rng.random(), 0.7, -0.9, 0.4),
            Coefficients(0.0, 1.0, 0.0, 1.0),
        )
