"""Compiles the two native libraries; needs the standard library and ninja alone.

Each has a plain C ABI, so neither torch nor Python headers are needed:

- ``libqadapter_cpu.so`` from kernels/csrc/cpu, by the C++ compiler ($CXX, g++, c++ or clang++);
- ``libqadapter_cuda.so`` from kernels/csrc/cuda, by nvcc if there is one ($CUDA_HOME, PATH or
  PyPI's nvidia-cuda-nvcc).
  $QADAPTER_CUDA_ARCHS narrows its targets, for example "90a" or "80;90a".

``build_all`` puts them into a folder beside ``build_report.json``, which says what was built and
how, or why not.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("cpu", "cuda")
LEFT_OUT = "this wheel holds none; an install from the sdist compiles it"
CUDA_ARCHS = ("80", "90a", "100f", "120")
"""100f is the family of 10.0 and 10.3 (B200, B300): code for 100a would not run on 10.3."""

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden",
             "-fno-strict-aliasing", "-Wall", "-Wextra"]
SANITIZE_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
                  "-fno-sanitize-recover=all"]
# One translation unit an instruction set, chosen at run time; all others are the portable baseline.
ISA_FLAGS = {
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")


class NotBuilt(Exception):
    """A library can't be built here; the message is what the user is told, in one line."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


def find_cxx() -> str | None:
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "c++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


def find_nvcc() -> str | None:
    """The machine's, else that of the package nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME")
    found = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    packaged = (str(path) for path in files_of("nvidia-cuda-nvcc", "nvcc"))
    return found or next(filter(shutil.which, packaged), None)


def files_of(package: str, name: str) -> list[Path]:
    """What an installed package has of this name."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    return [Path(file.locate()) for file in files if file.name == name]


def find_ninja() -> str:
    # Of the build requirement's own files: its executable need not be on PATH, and by PATH and by
    # the package's constant, a build in an environment of its own finds the script of another
    # release, which calls the package, which calls the script, without end.
    for path in files_of("ninja", "ninja"):
        if path.is_file() and path.read_bytes()[:2] != b"#!":
            return str(path)
    found = shutil.which("ninja")
    if found is None:
        raise NotBuilt("ninja was not found")
    return found


def version_of(compiler: str) -> str:
    """The one line of ``--version`` that names a release."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


def is_clang(compiler: str) -> bool:
    """Its OpenMP calls a runtime of its own."""
    macros = subprocess.run(
        [compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    ).stdout
    return "__clang__" in macros


def default_archs(nvcc: str) -> list[str]:
    """Of ``CUDA_ARCHS`` what this nvcc can compile for: 10.0 and 12.0 came with 12.8, families with
    12.9."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    release = re.search(r"release (\d+)\.(\d+)", version_of(nvcc))
    families = release is None or tuple(map(int, release.groups())) >= (12, 9)
    archs = [arch for arch in CUDA_ARCHS if not known or arch.rstrip("af") in known]
    return archs if families else [arch.replace("f", "a") for arch in archs]


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_ninja(
    folder: Path, output: Path, compiler: str, compile_rule: str, link_rule: str,
    sources: dict[Path, list[str]], glibc: str | None,
) -> None:
    """Compiles each source with its own extra flags and links all into output, which then runs with
    ``glibc`` ("2.28") and newer; None: with this machine's and newer."""
    folder.mkdir(parents=True, exist_ok=True)
    linked = folder / output.name
    _ninja(folder, linked, compiler, compile_rule, link_rule, sources)
    if glibc and (symbols := newer_symbols(linked, glibc, compiler)):
        source = folder / "older_glibc.cpp"
        source.write_text(stand_ins(symbols))
        flags = [f"-Xlinker --wrap={symbol}" for symbol in symbols] + OLD_GLIBC_LIBRARIES
        link_rule = f"{link_rule} {' '.join(flags)}"
        _ninja(folder, linked, compiler, compile_rule, link_rule, {**sources, source: []})
    output.parent.mkdir(parents=True, exist_ok=True)
    # A fresh inode: a process that has the old library mapped must not see it change.
    temporary = output.with_suffix(".new")
    shutil.copyfile(linked, temporary)
    temporary.replace(output)


def _ninja(
    folder: Path, linked: Path, compiler: str, compile_rule: str, link_rule: str,
    sources: dict[Path, list[str]],
) -> None:
    objects = {source: folder / f"{source.stem}.o" for source in sources}
    lines = [
        f"compiler = {escape(compiler)}",
        "rule compile", f"  command = {compile_rule}", "  depfile = $out.d", "  deps = gcc",
        "rule link", f"  command = {link_rule}",
    ]
    for source, flags in sources.items():
        lines += [f"build {escape(objects[source])}: compile {escape(source)}",
                  f"  extra = {' '.join(flags)}"]
    joined = " ".join(map(escape, objects.values()))
    lines += [f"build {escape(linked)}: link {joined}", f"default {escape(linked)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run(
        [find_ninja(), "-C", str(folder)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        log = done.stdout + "".join(path.read_text() for path in sorted(folder.glob("*.log")))
        errors = [line for line in log.splitlines() if "error" in line.lower()]
        first = errors[0] if errors else "no message"
        raise NotBuilt(f"{Path(compiler).name} failed: {first}", log[:8000])


# A library takes each function of glibc in the newest version that the linking machine has, and so
# runs on no older system. Where glibc has kept an older version of the function, a stand-in that
# jumps there takes its place.

OLD_GLIBC_LIBRARIES = ["-Xlinker --no-as-needed"] + [
    f"-Xlinker -l:{name}" for name in ("libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1")
]
"""What libc.so.6 holds since 2.34 was in these before; they are there on every glibc."""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def glibc_symbols(library: str | Path, undefined: bool) -> list[tuple[str, str]]:
    """(name, version) of the functions that a library takes from glibc, or has in it."""
    listed = subprocess.run(["objdump", "-T", str(library)], text=True, capture_output=True)
    if listed.returncode != 0:
        raise NotBuilt(f"objdump failed: {listed.stderr.strip()}")
    lines = [line for line in listed.stdout.splitlines() if ("*UND*" in line) == undefined]
    found = (re.search(r"\bGLIBC_(\d[\d.]*)\)?\s+(\w+)$", line) for line in lines)
    return [(match[2], match[1]) for match in found if match]


def newer_symbols(library: Path, glibc: str, compiler: str) -> dict[str, str]:
    """Symbol → the version to take instead, for what the library takes from a newer glibc."""
    newer = {name for name, version in glibc_symbols(library, True)
             if numbers(version) > numbers(glibc)}
    if not newer:
        return {}
    if not IS_X86_64:
        raise NotBuilt(f"a library for glibc {glibc} can be linked here on x86-64 alone")
    older: dict[str, str] = {}
    for file in ("libc.so.6", "libm.so.6"):
        for name, version in glibc_symbols(find_library(compiler, file), False):
            if name in newer and numbers(version) <= numbers(glibc):
                older[name] = max(version, older.get(name, "0"), key=numbers)
    if missing := sorted(newer - older.keys()):
        raise NotBuilt(f"glibc {glibc} has no {missing[0]}")
    return dict(sorted(older.items()))


def find_library(compiler: str, file: str) -> str:
    host = find_cxx() if Path(compiler).name == "nvcc" else compiler
    if host is None:
        raise NotBuilt("no C++ compiler was found (CXX, g++, c++ or clang++)")
    return subprocess.run(
        [host, f"-print-file-name={file}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def stand_ins(symbols: dict[str, str]) -> str:
    """C++ source: for the linker's ``--wrap``, what each symbol's uses go to."""
    lines = []
    for name, version in symbols.items():
        lines += [f".symver older_{name}, {name}@GLIBC_{version}",
                  f".globl __wrap_{name}", f".hidden __wrap_{name}",
                  f".type __wrap_{name}, @function",
                  f"__wrap_{name}: jmp older_{name}@PLT"]
    return "asm(R\"(" + "\n".join(lines) + "\n)\");\n"


def build_cpu(folder: Path, lib: Path, sanitize: bool, glibc: str | None) -> dict:
    files = sorted((ROOT / "kernels/csrc/cpu").glob("*.cpp"))
    if not files:
        raise NotBuilt("the C++ sources are missing")
    compiler = find_cxx()
    if compiler is None:
        raise NotBuilt("no C++ compiler was found (CXX, g++, c++ or clang++)")
    flags = CXX_FLAGS + (SANITIZE_FLAGS if sanitize else [])
    if not IS_X86_64:
        files = [file for file in files if file.stem not in ISA_FLAGS]
    sources = {file: ISA_FLAGS.get(file.stem, []) for file in files}
    output = lib / "libqadapter_cpu.so"
    # GCC's OpenMP is left to the runtime that torch has loaded (native.py): a second one would
    # fight with it for the cores, and a machine without a compiler need not have one.
    link_flags = flags if is_clang(compiler) else [x for x in flags if x != "-fopenmp"]
    run_ninja(
        folder, output, compiler,
        compile_rule=f"$compiler {' '.join(flags)} $extra -MMD -MF $out.d -c $in -o $out",
        link_rule=f"$compiler {' '.join(link_flags)} -shared $in -o $out",
        sources=sources, glibc=glibc,
    )
    return {"file": output.name, "compiler": version_of(compiler), "flags": flags,
            "instruction_sets": [s.stem.removeprefix("isa_") for s in sources if "isa_" in s.stem]}


def build_cuda(folder: Path, lib: Path, glibc: str | None) -> dict:
    files = sorted((ROOT / "kernels/csrc/cuda").glob("*.cu"))
    if not files:
        raise NotBuilt("the CUDA sources are missing")
    compiler = find_nvcc()
    if compiler is None:
        raise NotBuilt("nvcc was not found (PATH or CUDA_HOME)")
    named = os.environ.get("QADAPTER_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
    archs = [arch.removeprefix("sm_") for arch in named.split(";") if arch]
    archs = archs or default_archs(compiler)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if plain := [arch for arch in archs if arch.isdigit()]:
        # PTX of the oldest target, so that devices between and after the listed ones are served.
        oldest = min(plain, key=int)
        codes.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
    flags = ["-std=c++17", "-O3", "--threads=0", "-cudart=static",
             "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", *codes]
    # PyPI's packages have their libraries where their compiler doesn't look.
    static = Path(compiler).absolute().parents[1] / "lib/libcudart_static.a"
    beside = f"-L{escape(static.parent)} " if static.exists() else ""
    output = lib / "libqadapter_cuda.so"
    run_ninja(
        folder, output, compiler,
        # The resource usage of every kernel, kept beside the object for the report.
        compile_rule=f"$compiler {' '.join(flags)} -MD -MF $out.d -c $in -o $out > $out.log 2>&1",
        link_rule=f"$compiler {beside}-cudart=static -shared $in -o $out",
        sources={file: [] for file in files}, glibc=glibc,
    )
    log = "\n".join((folder / f"{file.stem}.o.log").read_text() for file in files)
    return {"file": output.name, "compiler": version_of(compiler), "flags": flags,
            "targets": [f"sm_{arch}" for arch in archs], "ptxas": log.splitlines()}


def build_all(
    folder: Path, lib: Path, only: str | None = None, sanitize: bool = False,
    wanted: tuple[str, ...] | None = None, glibc: str | None = None,
) -> None:
    """Builds into lib and writes lib/build_report.json.

    Args:
        only: builds this one; what the report says of the other stays.
        wanted: None: what can be built is built. Else these and no others.
        glibc: the oldest that what is built has to run with; None: this machine's.

    Raises:
        NotBuilt: one that is wanted can't be built.
    """
    report_file = lib / "build_report.json"
    report = json.loads(report_file.read_text()) if only and report_file.exists() else {}
    builders = {
        "cpu": lambda: build_cpu(
            folder / ("cpu-sanitize" if sanitize else "cpu"), lib, sanitize, glibc
        ),
        "cuda": lambda: build_cuda(folder / "cuda", lib, glibc),
    }
    for name, builder in builders.items():
        if only not in (None, name):
            report.setdefault(name, {"built": False, "reason": f"only {only} was asked for"})
            continue
        start = time.monotonic()
        try:
            if wanted is not None and name not in wanted:
                raise NotBuilt(LEFT_OUT)
            report[name] = {"built": True, **builder(),
                            "seconds": round(time.monotonic() - start, 1)}
            print(f"qadapter: built the {name} library with {report[name]['compiler']}")
        except (NotBuilt, OSError) as error:
            log = getattr(error, "log", "")
            if name in (wanted or ()):
                print(log)
                raise NotBuilt(f"the {name} library can't be built: {error}", log) from error
            report[name] = {"built": False, "reason": str(error), "log": log}
            (lib / f"libqadapter_{name}.so").unlink(missing_ok=True)
            print(f"qadapter: left out the {name} library: {error}", log, sep="\n")
    lib.mkdir(parents=True, exist_ok=True)
    report_file.write_text(json.dumps(report, indent=1) + "\n")
