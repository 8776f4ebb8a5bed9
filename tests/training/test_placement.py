"""Where features go: known, and said, before the base runs."""

import re

import pytest
import torch
from training_tiny import build_model, build_pairs, build_tokenizer

from qadapter.data import tokenize_preferences
from qadapter.errors import QAdapterError
from qadapter.training import base_reading, retention
from qadapter.training.features import compute_features, feature_bytes
from qadapter.training.placement import DiskRoom, place
from qadapter.training.retention import RetentionStates


def disk(free, to_write):
    return lambda: DiskRoom("/somewhere", free, to_write)


def no_disk():
    raise AssertionError("the disk was looked at")


@pytest.mark.parametrize("wanted, needed, memory, look, where", [
    ("auto", 50, 100, no_disk, "memory"), ("auto", 51, 100, disk(51, 51), "disk"),
    ("memory", 100, 100, no_disk, "memory"), ("disk", 1, 100, disk(1, 1), "disk"),
    # What an earlier run wrote needs no room.
    ("disk", 1000, 10, disk(0, 0), "disk"),
])
def test_memory_if_it_has_ample_room_else_disk(wanted, needed, memory, look, where):
    found = place(wanted, needed, memory, look)
    assert found.where == where and f"{needed:,} bytes" in found.reason
    assert f"{memory:,} bytes of memory" in found.reason


@pytest.mark.parametrize("wanted, look", [
    ("memory", no_disk), ("auto", disk(100, 101)), ("disk", disk(100, 101)),
])
def test_what_fits_nowhere_is_refused_with_the_numbers(wanted, look):
    with pytest.raises(QAdapterError, match="cache_features") as error:
        place(wanted, 101, 100, look)
    assert "101 bytes" in str(error.value) and "100 bytes of memory" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_estimate_is_what_features_take(dtype, masked):
    tokenized = tokenize_preferences(build_pairs(9), build_tokenizer()).dataset
    if masked:
        tokenized = tokenized.map(lambda row: {
            f"{side}_mask": [i % 2 == 0 for i in range(len(row[f"{side}_ids"]))]
            for side in ("chosen", "rejected")
        })
    model = build_model(dtype=dtype)
    estimate, features = int(feature_bytes(model, tokenized).sum()), compute_features(
        model, tokenized
    )
    assert estimate + 8 == features.nbytes  # one offset more than sequences


def test_more_than_the_memory_goes_to_disk_and_trains_alike(make_trainer, pairs, monkeypatch,
                                                            tmp_path):
    in_memory = make_trainer(train=pairs)
    in_memory.train()
    monkeypatch.setattr(base_reading, "available_memory", lambda: 1000)
    lines = []
    trainer = make_trainer(train=pairs, feature_cache_dir=str(tmp_path / "cache"),
                           say=lines.append)
    trainer.train()
    logs, line = lines
    assert "entropy and KL are not logged" in logs
    assert "kept on disk" in line and "1,000 bytes of memory" in line
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert [h.get("loss") for h in trainer.state.log_history] == [
        h.get("loss") for h in in_memory.state.log_history
    ]


@pytest.mark.parametrize("wanted", ["auto", "memory", "disk"])
def test_no_room_is_known_before_the_base_runs(make_trainer, pairs, monkeypatch, tmp_path, wanted):
    monkeypatch.setattr(base_reading, "available_memory", lambda: 1000)
    monkeypatch.setattr(base_reading, "free_disk", lambda folder: 1000)
    trainer = make_trainer(train=pairs, evaluation=pairs, eval_strategy="epoch",
                           cache_features=wanted, feature_cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(base_reading, "compute_features", None)
    monkeypatch.setattr(base_reading.feature_store, "load_or_compute", None)
    monkeypatch.setattr(base_reading, "feature_bytes", lambda model, data: torch.tensor([600, 5]))
    with pytest.raises(QAdapterError, match="cache_features") as error:
        trainer.train()
    assert "1.2 KiB" in str(error.value)  # both sets together
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_unwritable_cache_is_named_before_the_base_runs(make_trainer, pairs, monkeypatch,
                                                           tmp_path):
    (tmp_path / "file").write_text("")
    trainer = make_trainer(train=pairs, cache_features="disk",
                           feature_cache_dir=str(tmp_path / "file/cache"))
    monkeypatch.setattr(base_reading.feature_store, "load_or_compute", None)
    with pytest.raises(QAdapterError, match="feature_cache_dir"):
        trainer.train()


def test_retention_texts_beyond_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(retention, "available_memory", lambda: 100)
    with pytest.raises(QAdapterError, match="retention_dataset") as error:
        RetentionStates(build_model(), build_tokenizer(), ["w1 w2 w3", "w4 w5"])
    assert re.search(r"3 states", str(error.value))


def unwritable():
    raise QAdapterError("feature_cache_dir can't be written")


def test_several_processes_keep_one_copy_on_disk_where_they_can():
    assert place("auto", 100, 10_000, no_disk).where == "memory"
    shared = place("auto", 100, 10_000, disk(1000, 100), 2)
    assert shared.where == "disk" and "once for 2 processes" in shared.reason
    assert place("auto", 100, 10_000, disk(10, 100), 2).where == "memory"
    assert place("auto", 100, 10_000, unwritable, 2).where == "memory"
    assert place("memory", 100, 10_000, disk(1000, 100), 2).where == "memory"
    with pytest.raises(QAdapterError, match=r"cache_features memory: .* take 200 bytes"):
        place("memory", 100, 150, disk(1000, 100), 2)
