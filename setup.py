"""Compiles the native kernels at install time; everything else is in pyproject.toml.

Two shared libraries with a plain C ABI, so neither torch nor Python headers are needed here:

- ``libqadapter_cpu.so`` from kernels/csrc/cpu, by the C++ compiler ($CXX, g++, c++ or clang++);
- ``libqadapter_cuda.so`` from kernels/csrc/cuda, by nvcc if there is one (PATH or $CUDA_HOME).
  $QADAPTER_CUDA_ARCHS narrows its targets, for example "90a" or "80;90a".

They land in ``qadapter_kernels/lib`` beside ``build_report.json``, which says what was built and
how, or why not. A missing or failing compiler never fails the install: the library is then left
out and ``qadapter_kernels`` says why. ``python setup.py build_native --inplace`` builds in the
checkout.
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

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = "qadapter_kernels"
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
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def find_ninja() -> str:
    try:  # the build requirement, whose executable need not be on PATH
        files = metadata.files("ninja") or []
    except metadata.PackageNotFoundError:
        files = []
    # Of the package's own files: by PATH and by the package's constant, a build in an environment
    # of its own finds the script of another release, which calls the package, which calls the
    # script, without end.
    for path in (file.locate() for file in files if file.name == "ninja"):
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
    sources: dict[Path, list[str]],
) -> str:
    """Compiles each source with its own extra flags, links all into output; returns the log."""
    folder.mkdir(parents=True, exist_ok=True)
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
    linked = folder / output.name
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
    output.parent.mkdir(parents=True, exist_ok=True)
    # A fresh inode: a process that has the old library mapped must not see it change.
    temporary = output.with_suffix(".new")
    shutil.copyfile(linked, temporary)
    temporary.replace(output)
    return done.stdout


def build_cpu(folder: Path, lib: Path, sanitize: bool) -> dict:
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
    run_ninja(
        folder, output, compiler,
        compile_rule=f"$compiler {' '.join(flags)} $extra -MMD -MF $out.d -c $in -o $out",
        link_rule=f"$compiler {' '.join(flags)} -shared $in -o $out",
        sources=sources,
    )
    return {"file": output.name, "compiler": version_of(compiler), "flags": flags,
            "instruction_sets": [s.stem.removeprefix("isa_") for s in sources if "isa_" in s.stem]}


def build_cuda(folder: Path, lib: Path) -> dict:
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
    output = lib / "libqadapter_cuda.so"
    run_ninja(
        folder, output, compiler,
        # The resource usage of every kernel, kept beside the object for the report.
        compile_rule=f"$compiler {' '.join(flags)} -MD -MF $out.d -c $in -o $out > $out.log 2>&1",
        link_rule="$compiler -cudart=static -shared $in -o $out",
        sources={file: [] for file in files},
    )
    log = "\n".join((folder / f"{file.stem}.o.log").read_text() for file in files)
    return {"file": output.name, "compiler": version_of(compiler), "flags": flags,
            "targets": [f"sm_{arch}" for arch in archs], "ptxas": log.splitlines()}


def build_all(folder: Path, lib: Path, only: str | None = None, sanitize: bool = False) -> None:
    """Builds what can be built into lib and writes lib/build_report.json. Never raises NotBuilt."""
    report_file = lib / "build_report.json"
    report = json.loads(report_file.read_text()) if only and report_file.exists() else {}
    builders = {
        "cpu": lambda: build_cpu(folder / ("cpu-sanitize" if sanitize else "cpu"), lib, sanitize),
        "cuda": lambda: build_cuda(folder / "cuda", lib),
    }
    for name, builder in builders.items():
        if only not in (None, name):
            report.setdefault(name, {"built": False, "reason": f"only {only} was asked for"})
            continue
        start = time.monotonic()
        try:
            report[name] = {"built": True, **builder(),
                            "seconds": round(time.monotonic() - start, 1)}
            print(f"qadapter: built the {name} library with {report[name]['compiler']}")
        except (NotBuilt, OSError) as error:
            report[name] = {"built": False, "reason": str(error), "log": getattr(error, "log", "")}
            (lib / f"libqadapter_{name}.so").unlink(missing_ok=True)
            print(f"qadapter: left out the {name} library: {error}", report[name]["log"], sep="\n")
    lib.mkdir(parents=True, exist_ok=True)
    report_file.write_text(json.dumps(report, indent=1) + "\n")


class BuildNative(Command):
    """A sub-command of ``build``; follows setuptools' protocol, so that editable installs work."""

    description = "compile the C++ and CUDA kernels"
    user_options = [  # noqa: RUF012  (distutils reads the class attribute)
        ("build-lib=", "d", "directory that gets qadapter_kernels/lib"),
        ("inplace", "i", "build into the source tree"),
        ("only=", None, "build one library: cpu or cuda"),
        ("sanitize", None, "address and undefined-behavior sanitizers (cpu only)"),
    ]
    boolean_options = ["inplace", "sanitize"]  # noqa: RUF012
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None
        self.inplace = False
        self.only = None
        self.sanitize = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))
        if self.sanitize:
            self.only = "cpu"

    def run(self) -> None:
        in_source = self.inplace or self.editable_mode
        top = ROOT / "kernels" if in_source else Path(self.build_lib).resolve()
        build_all(ROOT / "build/native", top / PACKAGE / "lib", self.only, bool(self.sanitize))

    def get_outputs(self) -> list[str]:
        if self.editable_mode:
            return []
        return [str(path) for path in (Path(self.build_lib) / PACKAGE / "lib").glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "kernels/csrc").rglob("*.*")]


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class BDistWheel(bdist_wheel):
    """The libraries depend on the platform, not on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return find_cxx() is not None or find_nvcc() is not None


setup(
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BDistWheel},
)
