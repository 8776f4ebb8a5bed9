"""What every Triton kernel costs on every target: registers, shared memory, spills. Needs no GPU.

The launches are the library's own: each public function is called with tensors of a realistic
shape on the CPU while its launches are recorded instead of run, and what was recorded is compiled
ahead of time for each target. So this compiles what users run, with the same specialization.

    python benchmarks/triton_resources.py                               # all; writes the table
    python benchmarks/triton_resources.py --targets cuda:90 --output -  # prints one
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are decorated; here they get compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from qadapter_kernels import triton as backend
from qadapter_kernels.reference import Coefficients, LogitHead
from qadapter_kernels.triton import launch

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
TABLE = Path(__file__).parent / "results" / "triton_resources.json"
VOCABULARY = 128_256  # Llama 3
ODD_VOCABULARY = 50_257  # GPT-2: rows start anywhere, and 16-byte loads are out
MANY, FEW = 512, 2  # rows: one program each, and split

POLICY = Coefficients(alpha_0=0.3, alpha_tilde=1.0, adapter_coef=1.0, base_coef=-0.3)
GENERAL = Coefficients(alpha_0=0.3, alpha_tilde=0.7, adapter_coef=1.0, base_coef=0.2)


class Launch(NamedTuple):
    kernel: triton.JITFunction
    args: tuple
    warps: int
    constants: dict


def _logits(rows: int, dtype: torch.dtype, odd: bool = False) -> torch.Tensor:
    """Never written, so never committed to memory."""
    return torch.empty((rows, ODD_VOCABULARY if odd else VOCABULARY), dtype=dtype)


def _soft_value(
    rows: int, dtype: torch.dtype, coef: Coefficients, cached: bool, statistics: bool,
    odd: bool = False,
) -> None:
    actions, lse = torch.empty(rows, dtype=torch.int64), torch.empty(rows) if cached else None
    a, b = _logits(rows, dtype, odd), _logits(rows, dtype, odd)
    backend.logits_forward(a, b, actions, coef, lse, statistics)


def _soft_value_backward(dtype: torch.dtype, coef: Coefficients, odd: bool = False) -> None:
    a, b, row = _logits(MANY, dtype, odd), _logits(MANY, dtype, odd), torch.empty(MANY)
    backend.logits_backward(
        a, b, torch.empty(MANY, dtype=torch.int64), torch.empty(2, MANY), row, row, coef, a
    )


def _rows(
    z_dtype: torch.dtype, p_dtype: torch.dtype, base: bool, exact: bool, statistics: bool,
    odd: bool = False,
) -> None:
    z = _logits(MANY, z_dtype, odd)
    backend.rows_forward(
        z, torch.empty_like(z) if base else None, torch.empty(MANY, dtype=torch.int64), 1.0, None,
        1.0, None, True, p_dtype, statistics, torch.empty(2, MANY) if exact else None,
    )


def _bradley_terry(backward: bool, bootstrap_next: bool) -> None:
    rows, sequences = torch.empty(4096), torch.empty(16)
    offsets, options = torch.empty(17, dtype=torch.int64), (0.9, 0.1, bootstrap_next, 0.125, 2.4e-4)
    if backward:
        backend.bradley_terry_backward(
            rows, sequences, offsets, sequences, *options, torch.empty(3), sequences, rows
        )
    else:
        backend.bradley_terry_forward(rows, rows, offsets, sequences, *options)


def _combine(strength: bool) -> None:
    a, b = _logits(FEW, torch.bfloat16), _logits(FEW, torch.bfloat16)
    backend.combine_logits(a, b, GENERAL, torch.empty(FEW) if strength else None)


def _sample(dtype: torch.dtype, odd: bool = False) -> None:
    backend.sample(_logits(FEW, dtype, odd), 0.7, 50, 0.9, 0.05, 1, 2)


def _scores(softcap: float | None, dial: tuple[float, float], odd: bool = False) -> None:
    base = _logits(MANY, torch.float32, odd)
    backend.score_rows(
        base, torch.empty_like(base), torch.empty(MANY, dtype=torch.int64),
        LogitHead(1.0, None, softcap), dial, POLICY,
    )


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable[[], None]] = {
    "soft_value forward, bf16": lambda: _soft_value(MANY, _BF16, POLICY, False, False),
    "soft_value forward, bf16, lse cached": lambda: _soft_value(MANY, _BF16, POLICY, True, False),
    "soft_value forward, bf16, two streams":
        lambda: _soft_value(MANY, _BF16, GENERAL, False, False),
    "soft_value forward, bf16, statistics": lambda: _soft_value(MANY, _BF16, GENERAL, False, True),
    "soft_value forward, fp16": lambda: _soft_value(MANY, _FP16, GENERAL, False, False),
    "soft_value forward, fp32": lambda: _soft_value(MANY, _FP32, GENERAL, False, False),
    "soft_value forward, fp32, statistics": lambda: _soft_value(MANY, _FP32, GENERAL, False, True),
    "soft_value forward, bf16, split": lambda: _soft_value(FEW, _BF16, GENERAL, False, False),
    "soft_value forward, bf16, split, statistics":
        lambda: _soft_value(FEW, _BF16, GENERAL, False, True),
    "soft_value backward, bf16": lambda: _soft_value_backward(_BF16, POLICY),
    "soft_value backward, bf16, two streams": lambda: _soft_value_backward(_BF16, GENERAL),
    "soft_value backward, fp32, two streams": lambda: _soft_value_backward(_FP32, GENERAL),
    "rows, fp32 to bf16": lambda: _rows(_FP32, _BF16, False, False, False),
    "rows, fp32 to bf16, base": lambda: _rows(_FP32, _BF16, True, False, False),
    "rows, fp32 to bf16, base, statistics": lambda: _rows(_FP32, _BF16, True, False, True),
    "rows, fp32": lambda: _rows(_FP32, _FP32, False, False, False),
    "rows, bf16, exact action": lambda: _rows(_BF16, _BF16, False, True, False),
    "rows, bf16, exact action, base, statistics": lambda: _rows(_BF16, _BF16, True, True, True),
    "bradley_terry forward, next": lambda: _bradley_terry(False, True),
    "bradley_terry backward, next": lambda: _bradley_terry(True, True),
    "bradley_terry backward, current": lambda: _bradley_terry(True, False),
    "combine_logits": lambda: _combine(False),
    "combine_logits, strength": lambda: _combine(True),
    "sample, fp32": lambda: _sample(_FP32),
    "sample, bf16": lambda: _sample(_BF16),
    "scores": lambda: _scores(None, (1.0, 0.0)),
    "scores, softcap, other strength": lambda: _scores(30.0, (0.5, 0.5)),
    "odd vocabulary: soft_value forward, bf16, two streams":
        lambda: _soft_value(MANY, _BF16, GENERAL, False, False, odd=True),
    "odd vocabulary: soft_value forward, bf16, statistics":
        lambda: _soft_value(MANY, _BF16, GENERAL, False, True, odd=True),
    "odd vocabulary: soft_value backward, bf16, two streams":
        lambda: _soft_value_backward(_BF16, GENERAL, odd=True),
    "odd vocabulary: rows, fp32 to bf16, base, statistics":
        lambda: _rows(_FP32, _BF16, True, False, True, odd=True),
    "odd vocabulary: rows, bf16, exact action, base, statistics":
        lambda: _rows(_BF16, _BF16, True, True, True, odd=True),
    "odd vocabulary: scores, softcap, other strength":
        lambda: _scores(30.0, (0.5, 0.5), odd=True),
    "odd vocabulary: sample, bf16": lambda: _sample(_BF16, odd=True),
}


def record(case: Callable[[], None]) -> list[Launch]:
    """The launches ``case`` makes."""
    launches = []

    def recorder(kernel, grid, *args, warps, **constants):
        launches.append(Launch(kernel, args, warps, constants))

    with mock.patch.object(launch, "launch", recorder):
        case()
    return launches


def source(recorded: Launch) -> ASTSource:
    """What Triton's own launcher would compile for these arguments: pointer types, None and 1 as
    constants, divisibility by 16, except where a kernel asks not to be specialized."""
    signature, constants, attributes = {}, dict(recorded.constants), {}
    arguments = zip(recorded.kernel.params, recorded.args, strict=False)  # constants come after
    for index, (parameter, value) in enumerate(arguments):
        name, specialize = parameter.name, not parameter.do_not_specialize
        aligned = False
        if value is None or (isinstance(value, int) and value == 1 and specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kinds = {_FP32: "fp32", _BF16: "bf16", _FP16: "fp16",
                     torch.int64: "i64", torch.int32: "i32"}
            signature[name], aligned = "*" + kinds[value.dtype], specialize
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialize and value % 16 == 0
        if aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    for name in recorded.constants:
        signature[name] = "constexpr"
    return ASTSource(recorded.kernel, signature, constants, attributes)


def compile_for(recorded: Launch, target: GPUTarget) -> dict[str, int]:
    """Compile one launch: registers a thread, shared memory in bytes, spills (bytes of stack a
    thread on NVIDIA, registers on AMD). Read from the binary: not every version of Triton hands
    out what its assembler says."""
    options = {"num_warps": launch.legal_warps(recorded.warps, target.warp_size)}
    compiled = triton.compile(source(recorded), target=target, options=options)
    threads = options["num_warps"] * target.warp_size
    row = {"threads": threads, "shared": compiled.metadata.shared}
    if target.backend == "cuda":
        report = cubin_usage(compiled.asm["cubin"])
        row["registers"] = int(re.search(r"REG:(\d+)", report)[1])
        row["spills"] = int(re.search(r"STACK:(\d+)", report)[1])
    else:
        report = compiled.asm["amdgcn"]
        row["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", report)[1])
        row["spills"] = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", report))
    return row


def cubin_usage(cubin: bytes) -> str:
    """What the reader of binaries that comes with Triton says about the one kernel in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        reader = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run(
            [reader, "--dump-resource-usage", file.name],
            check=True, stdout=subprocess.PIPE, text=True,
        ).stdout


def kernel_name(kernel: triton.JITFunction) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_')}"


def left_out(target: GPUTarget) -> str | None:
    """Why this Triton can't compile for ``target`` here: 3.4 links for AMD with ROCm's linker."""
    try:
        make_backend(target).hash()
    except Exception as error:
        return str(error)
    return None


def resources(targets: dict[str, GPUTarget], only: str = "") -> Iterator[dict]:
    for name, case in CASES.items():
        if not re.search(only, name):
            continue
        for recorded in record(case):
            for target_name, target in targets.items():
                yield {"case": name, "kernel": kernel_name(recorded.kernel),
                       "target": target_name, **compile_for(recorded, target)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="regular expression on the cases' names")
    parser.add_argument("--output", default=str(TABLE), help="a file, or - for standard output")
    args = parser.parse_args()
    reasons = {name: left_out(TARGETS[name]) for name in args.targets}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
    rows = []
    targets = {name: TARGETS[name] for name, reason in reasons.items() if not reason}
    for row in resources(targets, args.only):
        rows.append(row)
        print(*row.values(), file=sys.stderr)
    head = {"triton": triton.__version__, "date": str(date.today()), "vocabulary": VOCABULARY,
            "targets": list(targets)}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n'
    if args.output == "-":
        print(text)
    else:
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
