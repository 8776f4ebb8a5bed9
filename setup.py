"""The version, from git's tags, and the native kernels, compiled at install time
(kernels/native_build.py); everything else is in pyproject.toml.

The libraries land in ``qadapter_kernels/lib``. A missing or failing compiler never fails an
install: the library is then left out and ``qadapter_kernels`` says why. Wheels for others are told
what to hold: ``bdist_wheel --libraries=cpu,cuda`` holds these or fails, ``--libraries=none`` serves
every platform. ``python setup.py build_native --inplace`` builds in the checkout.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import LibError, OptionError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "kernels"))

from native_build import LIBRARIES, NotBuilt, build_all, find_cxx, find_nvcc  # noqa: E402

PACKAGE = "qadapter_kernels"
TAG = re.compile(r"v(\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?)")


def version() -> str:
    """A tag's own version on its commit, and the next one's ``.devN`` after it.

    An sdist holds its version; ``git archive`` writes what git would say into .git_archival.txt.
    Without a tag in sight (a shallow clone, a copy of the files) it is the beginning of what
    CHANGELOG.md says last.
    """
    if (ROOT / "PKG-INFO").exists():
        return re.search(r"^Version: (\S+)$", (ROOT / "PKG-INFO").read_text(), re.M)[1]
    described, commit = from_git() if (ROOT / ".git").exists() else from_archive()
    found = re.fullmatch(rf"{TAG.pattern}(?:-(\d+)-g\w+)?", described)
    if found is None:
        changes = ROOT / "CHANGELOG.md"
        text = changes.read_text() if changes.exists() else ""
        named = re.search(r"^## \[(\d[\d.]*)\]", text, re.M)
        return f"{named[1] if named else 0}.dev0" + (f"+g{commit}" if commit else "")
    tagged, distance = found.groups()
    if distance is None and not commit.endswith(".dirty"):
        return tagged
    coming = re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), tagged)
    return f"{coming}.dev{distance or 0}+g{commit}"


def from_git() -> tuple[str, str]:
    """What ``git describe`` says of the tags, and the commit's abbreviated hash, with ".dirty"
    where files differ from it; "" for what there is not."""
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("describe", "--always", "--dirty", "--exclude=*").replace("-", ".")
    return git("describe", "--tags", "--match=v[0-9]*"), commit


def from_archive() -> tuple[str, str]:
    """The same, as an archive holds it."""
    path = ROOT / ".git_archival.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    values = dict(line.split(": ", 1) for line in lines if ": " in line and "$Format" not in line)
    return values.get("describe", ""), values.get("commit", "")


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
        wheel = self.distribution
        try:
            build_all(ROOT / "build/native", top / PACKAGE / "lib", self.only, bool(self.sanitize),
                      wheel.native_libraries, wheel.oldest_glibc)
        except NotBuilt as error:
            raise LibError(str(error)) from error

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

    user_options = [  # noqa: RUF012
        *bdist_wheel.user_options,
        ("libraries=", None, "none, or what it has to hold: cpu,cuda (default: what can be built)"),
        ("glibc=", None, "the oldest glibc that they run with (default: this machine's)"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.libraries = None
        self.glibc = None

    def finalize_options(self) -> None:
        wanted = None
        if self.libraries is not None:
            wanted = () if self.libraries == "none" else tuple(self.libraries.split(","))
            if unknown := set(wanted) - set(LIBRARIES):
                raise OptionError(
                    f"--libraries={self.libraries}: {min(unknown)!r} is neither cpu nor cuda"
                )
        if self.glibc is not None and not re.fullmatch(r"\d+(\.\d+)+", self.glibc):
            raise OptionError(f"--glibc={self.glibc} is no version like 2.28")
        # Before it is asked whether the wheel is for one platform.
        self.distribution.native_libraries = wanted
        self.distribution.oldest_glibc = self.glibc
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


class NativeDistribution(Distribution):
    native_libraries: tuple[str, ...] | None = None
    oldest_glibc: str | None = None

    def has_ext_modules(self) -> bool:
        if self.native_libraries is not None:
            return bool(self.native_libraries)
        return find_cxx() is not None or find_nvcc() is not None


setup(
    version=version(),
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BDistWheel},
)
