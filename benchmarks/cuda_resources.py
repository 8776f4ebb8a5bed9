"""What every CUDA kernel costs on every target: registers, stack, spills. Needs nvcc, no GPU.

    python benchmarks/cuda_resources.py               # writes kernels/csrc/cuda/RESOURCES.md
    python benchmarks/cuda_resources.py --output -    # prints it
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parents[1] / "kernels/csrc/cuda"
TABLE = SOURCES / "RESOURCES.md"
TARGETS = ("sm_80", "sm_90a", "sm_100f", "sm_120")


class Usage(NamedTuple):
    kernel: str
    target: str
    registers: int
    stack: int
    spills: int
    """Bytes stored to and loaded from local memory."""


def find_nvcc() -> str | None:
    """As setup.py finds it."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def compile_all(targets: tuple[str, ...] = TARGETS) -> list[Usage]:
    """Compiles every source for every target with setup.py's flags; reads the compiler's report.

    Raises:
        RuntimeError: nvcc is missing or fails; holds its messages.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found (PATH or CUDA_HOME)")
    numbers = [target.removeprefix("sm_") for target in targets]
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "--threads=0", "-Xptxas=-v", *codes, "-c"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, *map(str, sorted(SOURCES.glob("*.cu")))], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        raise RuntimeError(done.stdout)
    return parse(done.stdout)


def parse(log: str) -> list[Usage]:
    """ptxas reports a kernel in three lines: its name and target, its stack, its registers."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers", re.DOTALL,
    )
    found = pattern.findall(log)
    names = demangle([mangled for mangled, *_ in found])
    return sorted(
        Usage(name, target, int(registers), int(stack), int(stores) + int(loads))
        for name, (_, target, stack, stores, loads, registers) in zip(names, found, strict=True)
    )


def demangle(names: list[str]) -> list[str]:
    """rows_forward<float, bf16, Streams> and the like."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = []
    for name in done.stdout.splitlines():
        name = re.sub(r"qadapter::|\(anonymous namespace\)::|^void ", "", name)
        name = name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
        short.append(name.replace("float", "fp32").split("(")[0])
    return short


def compiler_release() -> str:
    done = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True)
    return re.search(r"release ([\d.]+)", done.stdout)[1]


def table(usages: list[Usage]) -> str:
    """Registers a thread by kernel and target, in Markdown."""
    cells = {(u.kernel, u.target): u for u in usages}
    spilling = [u for u in usages if u.spills or u.stack]
    lines = [
        "# What the CUDA kernels use",
        "",
        f"Registers a thread, by nvcc {compiler_release()}. "
        "Written by `benchmarks/cuda_resources.py`.",
        "`rows_forward_cluster` is empty where there are no clusters to use (sm_80, sm_120).",
        "Shared memory is asked for at launch: 512 or 1,024 bytes, or a slice of the row (at most "
        "72 KB for rows up to 576 KB) and less than 2 KB for `rows_forward_cluster`.",
        "",
        f"Spills: {', '.join(f'{u.kernel} on {u.target}' for u in spilling) or 'none'}.",
        "",
        f"| kernel | {' | '.join(TARGETS)} |",
        f"| --- |{' ---: |' * len(TARGETS)}",
    ]
    for kernel in sorted({u.kernel for u in usages}):
        registers = (cells[kernel, target].registers for target in TARGETS)
        lines.append(f"| `{kernel}` | {' | '.join(map(str, registers))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(TABLE), help="a file, or - to print")
    output = parser.parse_args().output
    usages = compile_all()
    if output == "-":
        print(table(usages), end="")
    else:
        Path(output).write_text(table(usages))
    return int(any(usage.spills for usage in usages))


if __name__ == "__main__":
    sys.exit(main())
