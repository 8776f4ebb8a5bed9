"""What gets installed, with a compiler and without."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="tests of a checkout, and this is an installed copy"
)


def _python(*arguments: str, cwd: Path, status: int = 0, **environment: str) -> str:
    """Output of a child Python that finds no compiler unless ``environment`` names one."""
    hidden = ("PATH", "CXX", "CUDA_HOME", "PYTHONPATH", "QADAPTER_CUDA_ARCHS")
    inherited = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=inherited | {"PATH": ""} | environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkout without build products."""
    folder = tmp_path_factory.mktemp("source")
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, folder)
    skip = shutil.ignore_patterns("lib", "__pycache__", "results")
    for name in ("qadapter", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    return folder


@pytest.fixture(scope="module")
def wheel(source) -> zipfile.ZipFile:
    """A wheel built where there is no compiler."""
    _python("setup.py", "--quiet", "bdist_wheel", cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops - {info} == {"qadapter", "qadapter_kernels"}
    assert wheel.read(f"{info}/top_level.txt").split() == [b"qadapter", b"qadapter_kernels"]
    assert b"qadapter = qadapter.cli:main" in wheel.read(f"{info}/entry_points.txt")
    modules = {
        str(path.relative_to(folder)) for folder in (ROOT, ROOT / "kernels")
        for package in ("qadapter", "qadapter_kernels") for path in (folder / package).rglob("*.py")
    }
    assert modules <= set(names)
    data = ROOT / "qadapter/demo/data"
    assert {str(path.relative_to(ROOT)) for path in data.glob("*.jsonl")} <= set(names)
    assert {"qadapter/serving/page.html", "qadapter/data/passages.jsonl"} <= set(names)


def test_wheel_without_a_compiler_serves_every_platform_and_says_why(wheel, tmp_path):
    assert wheel.filename.endswith("py3-none-any.whl")
    wheel.extractall(tmp_path)
    program = """
import sys, qadapter, qadapter_kernels
from qadapter_kernels import native
print(qadapter.__file__, qadapter_kernels.__file__, sep="\\n")
print("transformers" in sys.modules, "triton" in sys.modules)
for backend in qadapter_kernels.backends():
    print(backend.name, backend.devices, backend.reason)
"""
    lines = _python("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert all(line.startswith(str(tmp_path)) for line in lines[:2])
    assert lines[2].startswith("False")
    reasons = {line.split()[0]: line for line in lines[3:]}
    assert "no C++ compiler was found" in reasons["cpu"]
    assert "nvcc was not found" in reasons["cuda"]


def test_failing_compilers_do_not_fail_the_install(source, tmp_path):
    failing = "echo 'row.cpp:1:2: error: too old'; exit 1"
    cxx = _script(tmp_path / "bin/g++", failing)
    _script(tmp_path / "cuda/bin/nvcc", failing)
    output = _python(
        "setup.py", "build_native", "--build-lib", str(tmp_path), cwd=source, CXX=str(cxx),
        CUDA_HOME=str(tmp_path / "cuda"),
    )
    assert "left out the cpu library: g++ failed: row.cpp:1:2: error: too old" in output
    report = json.loads((tmp_path / "qadapter_kernels/lib/build_report.json").read_text())
    assert not report["cpu"]["built"] and not report["cuda"]["built"]
    assert report["cuda"]["reason"] == "nvcc failed: row.cpp:1:2: error: too old"


def _wheel(source: Path, folder: Path, *options: str, **more) -> tuple[str, list[Path]]:
    """Output of a build into folder, and the wheels that are there."""
    output = _python(
        "setup.py", "--quiet", "bdist_wheel", f"--dist-dir={folder}", *options, cwd=source, **more
    )
    return output, sorted(folder.glob("*.whl"))


def test_a_wheel_for_every_platform_asks_no_compiler(source, tmp_path):
    called = tmp_path / "called"
    cxx = _script(tmp_path / "bin/g++", f"touch {called}")
    _, (path,) = _wheel(source, tmp_path, "--libraries=none", CXX=str(cxx), PATH=str(cxx.parent))
    assert path.name.endswith("py3-none-any.whl") and not called.exists()
    wheel = zipfile.ZipFile(path)
    report = json.loads(wheel.read("qadapter_kernels/lib/build_report.json"))
    assert "an install from the sdist compiles it" in report["cpu"]["reason"]
    assert report["cpu"] == report["cuda"] and not report["cpu"]["built"]
    assert not [name for name in wheel.namelist() if name.endswith(".so")]


def test_a_wheel_holds_what_it_was_asked_to_or_is_not_made(source, tmp_path):
    """A compiler that compiles whatever it is given."""
    cxx = _script(tmp_path / "bin/g++", '''
test "$1" = --version && echo "g++ 1.0"
while [ $# -gt 1 ]; do test "$1" = -o && /usr/bin/touch "$2"; shift; done
exit 0''')
    output, wheels = _wheel(source, tmp_path / "a", "--libraries=cpu,cuda", CXX=str(cxx), status=1)
    assert "error: the cuda library can't be built: nvcc was not found" in output and not wheels
    _, (path,) = _wheel(source, tmp_path / "b", "--libraries=cpu", CXX=str(cxx))
    assert re.search(r"-py3-none-linux_\w+\.whl$", path.name)
    wheel = zipfile.ZipFile(path)
    assert "qadapter_kernels/lib/libqadapter_cpu.so" in wheel.namelist()
    report = json.loads(wheel.read("qadapter_kernels/lib/build_report.json"))
    assert report["cpu"]["built"] and not report["cuda"]["built"]


def test_an_sdist_holds_what_a_wheel_is_made_from(source, wheel, tmp_path):
    _python("setup.py", "--quiet", "sdist", f"--dist-dir={tmp_path}", cwd=source)
    [path] = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    assert path.name == f"{unpacked.name}.tar.gz"
    sources = {path.relative_to(ROOT) for path in (ROOT / "kernels/csrc").rglob("*")
               if path.suffix in (".cpp", ".hpp", ".inl", ".cu", ".cuh")}
    assert sources and not [path for path in sources if not (unpacked / path).exists()]
    assert {path.name for path in unpacked.iterdir()} >= {
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md", "constraints.txt"
    }
    assert not (unpacked / "tests").exists()
    _, [made] = _wheel(unpacked, tmp_path / "wheel", "--libraries=none")
    assert set(zipfile.ZipFile(made).namelist()) == set(wheel.namelist())


def test_the_changelog_and_the_citation_can_be_read():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    form = re.compile(r"\[(Unreleased|(\d+)\.(\d+)\.(\d+))\](?: - (\d{4}-\d\d-\d\d|unreleased))?")
    found = [form.fullmatch(heading) for heading in headings]
    assert found and all(found), headings
    released = [tuple(map(int, match.groups()[1:4])) for match in found if match[2]]
    assert released and released == sorted(released, reverse=True)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    paper = citation["preferred-citation"]
    number = paper["url"].rsplit("/", 1)[1]
    assert f"arXiv {number}" in (ROOT / "README.md").read_text()
    assert paper["authors"][0] == {"given-names": "Yi-Chen", "family-names": "Li"}


@pytest.mark.parametrize("option, message", [
    ("--libraries=cpu,rocm", "'rocm' is neither cpu nor cuda"),
    ("--libraries=", "'' is neither cpu nor cuda"),
    ("--glibc=new", "--glibc=new is no version like 2.28"),
])
def test_options_of_a_wheel_are_checked(source, tmp_path, option, message):
    output, wheels = _wheel(source, tmp_path, option, status=1)
    assert message in output and not wheels


@pytest.fixture
def native_build(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    return importlib.import_module("native_build")


def _linked(native_build, folder: Path, text: str, glibc: str | None) -> Path:
    folder.mkdir(exist_ok=True)
    source = folder / "source.cpp"
    source.write_text(text)
    native_build.run_ninja(
        folder, folder / "lib/it.so", native_build.find_cxx(),
        compile_rule="$compiler -fPIC $extra -MMD -MF $out.d -c $in -o $out",
        link_rule="$compiler -shared $in -o $out", sources={source: []}, glibc=glibc,
    )
    return folder / "lib/it.so"


GLIBC = pytest.mark.skipif(
    shutil.which("g++") is None or platform.libc_ver()[0] != "glibc"
    or platform.machine() != "x86_64", reason="no g++ for glibc on x86-64 here",
)


@GLIBC
def test_a_library_runs_with_an_older_glibc(native_build, tmp_path):
    text = """
#include <cmath>
#include <dlfcn.h>
#include <pthread.h>
static void* seventh(void* x) { *(double*)x = std::log(std::exp(7.0 * *(double*)x)); return 0; }
extern "C" double in_a_thread(double x) {
  pthread_t thread;
  if (pthread_create(&thread, nullptr, seventh, &x) || pthread_join(thread, nullptr)) return 0;
  return dlsym(RTLD_DEFAULT, "malloc") ? x : 0;
}
"""
    for glibc in (None, "2.17"):
        path = _linked(native_build, tmp_path / str(glibc), text, glibc)
        needed = {native_build.numbers(version)
                  for _, version in native_build.glibc_symbols(path, True)}
        assert glibc is None or max(needed) <= (2, 17)
        function = ctypes.CDLL(str(path)).in_a_thread
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
        assert function(0.5) == pytest.approx(3.5)


@GLIBC
def test_what_an_older_glibc_has_not_got_is_named(native_build, tmp_path):
    text = "#include <threads.h>\nextern \"C\" int it() { return thrd_equal(thrd_current(), 0); }"
    with pytest.raises(native_build.NotBuilt, match=r"^glibc 2\.17 has no thrd_current$"):
        _linked(native_build, tmp_path, text, "2.17")


def test_cuda_targets_can_be_narrowed(source, tmp_path):
    """A compiler that only writes down what it was asked."""
    log = tmp_path / "log"
    nvcc = _script(tmp_path / "bin/nvcc", f"echo \"$@\" >> {log}\ntest \"$1\" = --version")
    for archs, expected in {
        "": ["80", "90a", "100f", "120"], "90a": ["90a"], "sm_80, 120": ["80", "120"],
    }.items():
        log.write_text("")
        _python(
            "setup.py", "build_native", "--only=cuda", "--build-lib", str(tmp_path), cwd=source,
            CUDA_HOME=str(nvcc.parents[1]), QADAPTER_CUDA_ARCHS=archs,
        )
        compiles = [line for line in log.read_text().splitlines() if " -c " in line]
        assert compiles
        for arch in ("80", "90a", "100f", "120"):
            assert (f"code=sm_{arch} " in compiles[0]) == (arch in expected)


@pytest.mark.parametrize("release, listed, expected", [
    ("13.0", (80, 90, 100, 103, 120), ["80", "90a", "100f", "120"]),
    ("12.8", (80, 90, 100, 120), ["80", "90a", "100a", "120"]),  # knows no families yet
    ("12.4", (80, 90), ["80", "90a"]),
])
def test_an_older_nvcc_is_asked_for_what_it_knows(source, tmp_path, release, listed, expected):
    log = tmp_path / "log"
    known = " ".join(f"compute_{number}" for number in listed)
    nvcc = _script(tmp_path / "bin/nvcc", f'''
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  --list-gpu-arch) echo {known} ;;
  *) echo "$@" >> {log}; exit 1 ;;
esac''')
    _python(
        "setup.py", "build_native", "--only=cuda", "--build-lib", str(tmp_path), cwd=source,
        CUDA_HOME=str(nvcc.parents[1]),
    )
    compiled = next(line for line in log.read_text().splitlines() if " -c " in line)
    assert re.findall(r"code=sm_(\w+)", compiled) == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_one_build_serves_wheel_and_editable_installs(tmp_path):
    """The library of a real build, from the checkout's own objects, can be loaded."""
    path = os.environ["PATH"]
    _python(
        "setup.py", "build_native", "--only=cpu", "--build-lib", str(tmp_path), cwd=ROOT, PATH=path
    )
    lib = tmp_path / "qadapter_kernels/lib"
    report = json.loads((lib / "build_report.json").read_text())
    assert report["cpu"]["built"] and report["cpu"]["file"] == "libqadapter_cpu.so"
    assert "portable" in report["cpu"]["instruction_sets"]
    # GCC's OpenMP is the one that torch brings.
    assert "g++" not in report["cpu"]["compiler"] or b"libgomp" not in (
        lib / "libqadapter_cpu.so").read_bytes()
    program = f"""
import torch
from pathlib import Path
from qadapter_kernels import native
native.LIBRARY_FOLDER = Path({str(lib)!r})
assert native.unavailable_reason("cpu") is None, native.unavailable_reason("cpu")
assert native.build_report()["cuda"]["reason"]
"""
    _python("-c", program, cwd=ROOT)


def test_the_folder_kernels_never_shadows_the_package_kernels(tmp_path):
    """transformers imports Hugging Face's ``kernels``; our folder stands on sys.path before it
    whenever Python runs at the repository's root."""
    assert not (ROOT / "kernels/__init__.py").exists()
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("theirs = True\n")
    program = "import sys; sys.path.append(sys.argv[1]); import kernels; assert kernels.theirs"
    _python("-c", program, str(tmp_path), cwd=ROOT)
