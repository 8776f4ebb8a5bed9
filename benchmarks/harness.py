"""What every benchmark shares: interleaved timing, peak memory, the environment, the records.

Timing: the cases of a group run in turn, round after round, so that whatever disturbs the machine
disturbs all of them alike. Medians and quartiles are reported, the minimum is kept. A GPU is timed
by events, with a cold L2.

Memory: the most a call holds beyond what was there before it. On a GPU the caching allocator knows.
On a CPU a fresh process a case runs it, and the kernel knows: the high-water mark of resident
memory, reset right before the call.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import FAILED

from qadapter.trunk.base_dtype import choose_for, dtype_name
from qadapter_kernels import cpu_backend, native

_IMPORTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "triton", "transformers", "peft", "liger-kernel", "trl", "cut-cross-entropy",
    "quack-kernels", "nvidia-cutlass-dsl", "qadapter",
)
MEBIBYTE = 1 << 20
WARM_ROWS = 32
L2_FLUSH_BYTES = 256 * MEBIBYTE


class Head(NamedTuple):
    """A model's output matrix [V, D]."""

    vocab: int
    hidden: int


HEADS = {
    "SmolLM2-135M": Head(49_152, 576),
    "Llama-3.2-1B": Head(128_256, 2048),
    "Llama-3.1-8B": Head(128_256, 4096),
    "tiny": Head(1_031, 64),
}


class Unavailable(Exception):
    """A provider can't run here; the message says why."""


class FellBack(Exception):
    """A slower path would serve than the one this row is about: a failed row, not a slow one. The
    message says which path, and why."""


class Case(NamedTuple):
    """One thing to time: ``run(prepare())``, of which only ``run`` is timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


class Timing(NamedTuple):
    """Milliseconds."""

    ms: float
    """Median."""
    ms_quartiles: tuple[float, float]
    ms_min: float
    rounds: int


# --- time ---------------------------------------------------------------------------------------


def interleave(
    cases: dict[str, Callable[[], Case]], device: str, *, budget: float, max_rounds: int = 30,
    min_rounds: int = 3, on_ready: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing | str]:
    """Time cases side by side.

    Args:
        cases: builders by name. A case that can't be built or run (not installed, out of memory,
            unsupported here), at once or in a later round, yields the reason instead of a time.
        budget: seconds for the whole group, after which no round is started (min_rounds first).
        on_ready: called when a case is built and warmed up.
    """
    ready: dict[str, Case] = {}
    outcomes: dict[str, Timing | str] = {}
    for name, build in cases.items():
        try:
            case = build()
            case.run(case.prepare())  # compilation, autotuning, lazy handles
            synchronize(device)
        except Exception as error:  # a peer's reason to fail is a result of this benchmark
            outcomes[name] = reason(error)
            free(device)
            continue
        ready[name] = case
        on_ready(name)

    samples: dict[str, list[float]] = {name: [] for name in ready}
    flush = None
    if device == "cuda":
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    order, start, rounds = list(ready), time.monotonic(), 0
    while order and rounds < max_rounds and (
        rounds < min_rounds or time.monotonic() - start < budget
    ):
        for name in order[rounds % len(order):] + order[: rounds % len(order)]:
            case = ready[name]
            try:
                prepared = case.prepare()
                samples[name].append(_time_once(case.run, prepared, device, flush))
            except Exception as error:  # out of memory beside the others, compiled once too often
                outcomes[name] = reason(error)
                del samples[name], ready[name]
                free(device)
            prepared = None
        order = [name for name in order if name in ready]
        rounds += 1
    for name, times in samples.items():
        low, median, high = (
            statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        )
        outcomes[name] = Timing(median, (low, high), min(times), len(times))
    return {name: outcomes[name] for name in cases}


def _time_once(
    run: Callable[[Any], Any], prepared: Any, device: str, flush: torch.Tensor | None
) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # also a backlog, behind which the first launches hide
        begin.record()
        run(prepared)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    gc.disable()
    try:
        start = time.perf_counter()
        run(prepared)
        return (time.perf_counter() - start) * 1e3
    finally:
        gc.enable()


def forget_compiled() -> None:
    """Lets every shape compile for itself: past a few recompilations PyTorch stops compiling and
    runs eagerly, which fails here. Costs nothing where nothing was compiled."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.reset()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """One line of an exception."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    if isinstance(error, FellBack):
        kind = FAILED
    return f"{kind}{text}"[:160]


# --- memory -------------------------------------------------------------------------------------


def peak_extra_memory(build: Callable[..., Case], arguments: tuple, rows: int, device: str,
                      warm_in_full: bool) -> int:
    """Most bytes that one run holds beyond those held before it.

    Args:
        build: a module-level function; ``build(*arguments, rows)`` makes the case.
        warm_in_full: warm up with all rows instead of a few. What is compiled for a shape has to;
            for the rest it would hide what a first call leaves behind.
    """
    if device == "cuda":
        return peak_cuda(build(*arguments, rows))
    # Freed blocks go back to the system at once, and a thread's pool can't grow unseen.
    settings = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "0"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            return fresh.submit(
                _peak_cpu, build, arguments, rows, warm_in_full, torch.get_num_threads()
            ).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def peak_cuda(case: Case) -> int:
    """The same for a case that is there already, by the caching allocator."""
    case.run(case.prepare())
    prepared = case.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.run(prepared)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(
    build: Callable[..., Case], arguments: tuple, rows: int, warm_in_full: bool, threads: int
) -> int:
    torch.set_num_threads(threads)
    warm = build(*arguments, rows if warm_in_full else min(rows, WARM_ROWS))
    warm.run(warm.prepare())
    del warm
    case = build(*arguments, rows)
    prepared = case.prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _proc_bytes("/proc/self/status", "VmRSS")
    case.run(prepared)
    return max(0, _proc_bytes("/proc/self/status", "VmHWM") - before)


def _proc_bytes(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {field}")


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _proc_bytes("/proc/meminfo", "MemAvailable")


# --- environment and records --------------------------------------------------------------------


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """Where a number comes from. The commit is git's, or the one given where git can't tell."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit() or commit,
        "machine": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if device == "cpu" and cpu_backend.unavailable_reason("cpu") is None:
        found["instructions"] = native.instruction_set()
    if device == "cuda":
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["driver"] = _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    model = fields.get("model name", platform.machine())
    return f"{model} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _commit() -> str | None:
    commit = _first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _first_line("git", "-C", str(ROOT), "status", "--porcelain", "--", "kernels")
    return f"{commit}, kernels changed since" if commit and changed else commit


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


class Recorder:
    """Writes one JSON line a measurement, as soon as it is there."""

    def __init__(
        self, kernel: str, device: str, dtype: str, output: Path, commit: str | None = None
    ):
        self.dtype = dtype
        self.fixed = {"kernel": kernel, "device": device, "dtype": dtype}
        self.environment = environment(device, commit)
        self.output: Path = output
        self.rows: list[dict[str, Any]] = []

    def add(self, **fields: Any) -> dict[str, Any]:
        row = {**self.fixed, **fields, "environment": self.environment}
        self.rows.append(row)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_rounded(row), ensure_ascii=False) + "\n")
        return row


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


# --- command line -------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every script takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("cpu", "cuda"),
                         default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--budget", type=float, default=20.0, metavar="SECONDS",
                         help="of timed rounds for each group of cases")
    options.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
                         help="of weights and logits; auto: bfloat16 on a GPU, what this machine "
                         "multiplies faster on a CPU")
    options.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's own choice")
    options.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER",
                         help="for the JSON lines (appended) and the picture")
    options.add_argument("--commit", help="of a copy that git knows nothing about")
    options.add_argument("--dry-run", action="store_true",
                         help="tiny shapes, to see that everything works; the numbers mean nothing")
    return options


def add_seconds(options: argparse.ArgumentParser) -> None:
    options.add_argument("--seconds", type=float, metavar="SECONDS",
                         help="begin no new shape after so long; what is measured by then is kept")


def in_time(options: argparse.Namespace, shape: str) -> bool:
    """Whether a shape may still begin; says which one may not."""
    begun = options.seconds is None or time.monotonic() - _IMPORTED < options.seconds
    if not begun:
        print(f"  left out, {options.seconds:g} s have passed: {shape}")
    return begun


def add_compile_rows(options: argparse.ArgumentParser) -> None:
    options.add_argument("--compile-rows", nargs="*", type=int, metavar="N",
                         help="run what torch.compile compiles for a shape at these N only: each "
                         "takes it several seconds")


def check_compiles(options: argparse.Namespace, rows: int) -> None:
    """For a case that torch.compile compiles for its shape.

    Raises:
        Unavailable: ``--compile-rows`` wants it at other N.
    """
    wanted = options.compile_rows
    if wanted is not None and rows not in wanted:
        at = f" but for N = {', '.join(map(str, wanted))}" if wanted else ""
        raise Unavailable(f"not compiled{at}, as asked")


def need_device(device: str) -> None:
    """
    Raises:
        SystemExit: it is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but PyTorch sees no GPU")


def start(options: argparse.Namespace, kernel: str) -> Recorder:
    """Applies the common options; ``options.dtype`` becomes torch's.

    Raises:
        SystemExit: CUDA was asked for and there is none.
    """
    need_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":
        # As on a processor that has no more: not only PyTorch's products.
        cpu_backend.select_instruction_set("avx2")
    if options.dry_run:
        options.budget = min(options.budget, 0.05)
    if options.dtype == "auto" and options.device == "cpu":
        choice = choose_for(torch.bfloat16, HEADS["SmolLM2-135M"].hidden)
        print(f"in {dtype_name(choice.dtype)}: {choice.reason}")
        options.dtype = dtype_name(choice.dtype)
    elif options.dtype == "auto":
        options.dtype = "bfloat16"
    name, options.dtype = options.dtype, getattr(torch, options.dtype)
    return Recorder(
        kernel, options.device, name, options.output / f"{kernel}.jsonl", options.commit
    )


def chosen(names: Sequence[str] | None, known: Iterable[str], what: str) -> list[str]:
    """Those of ``known`` that were named, or all.

    Raises:
        SystemExit: an unknown name.
    """
    known = list(known)
    for name in names or ():
        if name not in known:
            raise SystemExit(f"error: unknown {what} {name!r}; known: {', '.join(known)}")
    return [name for name in known if not names or name in names]

