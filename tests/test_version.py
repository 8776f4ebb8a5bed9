"""The version that a build takes from git's tags, and from what is left where there is no git."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "setup.py").exists(), reason="tests of a checkout, not of an installed copy"
    ),
    pytest.mark.skipif(shutil.which("git") is None, reason="no git here"),
]
FILES = ("setup.py", "kernels/native_build.py", ".gitattributes", ".gitignore",
         ".git_archival.txt")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _version(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def _commit(folder: Path) -> str:
    _git(folder, "add", "--all")
    _git(folder, "commit", "--quiet", "--allow-empty", "--message=more")
    return _git(folder, "rev-parse", "--short", "HEAD")


@pytest.fixture
def files(tmp_path) -> Path:
    """A copy of the files without git."""
    folder = tmp_path / "project"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.4.2]\n\n## [0.4.1]\n")
    return folder


@pytest.fixture
def repository(files) -> Path:
    _git(files, "init", "--quiet")
    _commit(files)
    return files


@pytest.mark.parametrize("tag, itself, coming", [
    ("v0.5.0", "0.5.0", "0.5.1"), ("v1.0", "1.0", "1.1"), ("v2.0.0rc1", "2.0.0rc1", "2.0.0rc2"),
])
def test_a_tag_and_the_commits_after_it(repository, tag, itself, coming):
    _git(repository, "tag", tag)
    assert _version(repository) == itself
    for number in (1, 2):
        commit = _commit(repository)
        assert _version(repository) == f"{coming}.dev{number}+g{commit}"


def test_changed_files_are_no_release(repository):
    _git(repository, "tag", "--annotate", "--message=release", "v0.5.0")
    commit = _git(repository, "rev-parse", "--short", "HEAD")
    (repository / "CHANGELOG.md").write_text("## [0.6.0]\n")
    assert _version(repository) == f"0.5.1.dev0+g{commit}.dirty"
    _git(repository, "tag", "--delete", "v0.5.0")
    assert _version(repository) == f"0.6.0.dev0+g{commit}.dirty"


def test_the_newest_tag_counts_and_tags_that_name_no_version_do_not(repository):
    _git(repository, "tag", "v0.5.0")
    _commit(repository)
    _git(repository, "tag", "v0.6.0")
    commit = _commit(repository)
    for other in ("paper", "nightly-2026", "version3"):
        _git(repository, "tag", other)
    assert _version(repository) == f"0.6.1.dev1+g{commit}"


def test_without_a_tag_the_changelog_says_what_is_coming(repository, tmp_path):
    commit = _git(repository, "rev-parse", "--short", "HEAD")
    assert _version(repository) == f"0.4.2.dev0+g{commit}"
    _git(repository, "tag", "v0.5.0")
    _commit(repository)
    shallow = tmp_path / "shallow"
    _git(tmp_path, "clone", "--quiet", "--depth=1", "--no-tags", f"file://{repository}", "shallow")
    commit = _git(shallow, "rev-parse", "--short", "HEAD")
    assert _version(shallow) == f"0.4.2.dev0+g{commit}"


def test_without_git_and_inside_another_repository(files, tmp_path):
    assert _version(files) == "0.4.2.dev0"
    (tmp_path / "other").write_text("")
    _git(tmp_path, "init", "--quiet")
    _commit(tmp_path)
    _git(tmp_path, "tag", "v9.9.9")
    assert _version(files) == "0.4.2.dev0"
    (files / "CHANGELOG.md").unlink()
    assert _version(files) == "0.dev0"


def test_archives_say_what_git_would(repository, tmp_path):
    def archived() -> str:
        _git(repository, "archive", "--output", str(tmp_path / "it.tar"), "HEAD")
        folder = tmp_path / "archive"
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(tmp_path / "it.tar") as archive:
            archive.extractall(folder, filter="data")
        return _version(folder)

    assert archived() == _version(repository) and "+g" in archived()
    _git(repository, "tag", "v0.5.0")
    assert archived() == "0.5.0"
    commit = _commit(repository)
    assert archived() == f"0.5.1.dev1+g{commit}"


def test_an_sdist_holds_its_version(files):
    (files / "PKG-INFO").write_text("Name: qadapter\nVersion: 0.7.0rc1\n\nVersion: of the text\n")
    assert _version(files) == "0.7.0rc1"


def test_the_package_says_what_was_installed():
    program = "import qadapter; print(qadapter.__version__); assert not hasattr(qadapter, 'other')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert re.match(r"\d", done.stdout), done.stderr
