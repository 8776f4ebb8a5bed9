"""Caches of runs that start together, of folders that can't be written, and of files that go."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_tiny import build_model, build_pairs, build_tokenizer

from qadapter.data import tokenize_preferences
from qadapter.errors import QAdapterError
from qadapter.system.hashing import file_sha256
from qadapter.system.sealed import sealed
from qadapter.training import feature_store, own_samples

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from training_tiny import build_model, build_pairs, build_tokenizer
from qadapter.data import tokenize_preferences
from qadapter.training import feature_store, own_samples

feature_store.MIB = 2048
tokenizer, model = build_tokenizer(), build_model()
data = tokenize_preferences(build_pairs(13), tokenizer).dataset
print("ready", flush=True)
sys.stdin.readline()
lines = []
features = feature_store.load_or_compute(
    model, data, tokenizer, max_length=1024, shard_mb=1, cache_dir=sys.argv[2], say=lines.append
)
samples = own_samples.load_or_sample(
    model, [[5, 6], [7, 8, 9]], tokenizer, cache_dir=sys.argv[2], say=lines.append
)
print(sum(shard.hidden.double().sum().item() for shard in features.shards), samples)
"""


def tokenized():
    return tokenize_preferences(build_pairs(13), build_tokenizer()).dataset


def load(cache, model=None, **changes):
    return feature_store.load_or_compute(
        model or build_model(), tokenized(), build_tokenizer(), max_length=1024, cache_dir=cache,
        **changes,
    )


@pytest.mark.slow
def test_processes_that_start_together(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "cache")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(3)
    ]
    try:
        for run in runs:
            assert run.stdout.readline() == "ready\n", run.communicate()[1]
        for run in runs:
            run.stdin.write("\n")
            run.stdin.flush()
        outputs = [run.communicate() for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not [name for name in left if "writing" in name]
    shards = {path.stem for path in (tmp_path / "cache").rglob("*.safetensors")}
    records = {path.stem for path in (tmp_path / "cache").rglob("features-*.json")}
    assert records == shards and len(shards) > 1
    assert not [name for name in left if name.startswith("features-") and name.endswith(".lock")]


def test_one_computes_and_the_others_wait(tmp_path, monkeypatch):
    compute, calls, start = feature_store.compute_shard, [], threading.Barrier(4)
    monkeypatch.setattr(
        feature_store, "compute_shard", lambda *x: calls.append(1) or compute(*x)
    )
    models, found = [build_model() for _ in range(4)], []

    def work(model):
        start.wait()
        found.append(load(tmp_path, model))

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(calls) == 1


def test_runs_with_files_of_other_sizes_leave_each_other_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "MIB", 2048)
    load(tmp_path, shard_mb=1)
    load(tmp_path, shard_mb=3)
    monkeypatch.setattr(feature_store, "compute_shard", None)
    load(tmp_path, shard_mb=1)
    load(tmp_path, shard_mb=3)


def test_a_cache_that_is_only_read(tmp_path, monkeypatch):
    """What is there whole needs neither a lock nor a folder that can be written."""
    load(tmp_path / "cache")
    own_samples.load_or_sample(build_model(), [[5]], None, cache_dir=tmp_path / "cache")

    def refuse(*_):
        raise PermissionError("read only")

    monkeypatch.setattr(feature_store.locking, "take", refuse)
    monkeypatch.setattr(own_samples, "exclusive", refuse)
    assert len(load(tmp_path / "cache")) == 13
    own_samples.load_or_sample(build_model(), [[5]], None, cache_dir=tmp_path / "cache")


def test_files_deleted_between_two_looks_are_computed_again(tmp_path, monkeypatch):
    first, loads = load(tmp_path), feature_store.Store._load

    def deleted(self, *numbers):
        monkeypatch.setattr(feature_store.Store, "_load", loads)
        shutil.rmtree(self.folder)
        return loads(self, *numbers)

    monkeypatch.setattr(feature_store.Store, "_load", deleted)
    again = load(tmp_path)
    assert torch.equal(again.shards[0].hidden, first.shards[0].hidden)


def test_samples_without_a_writable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    lines, model = [], build_model()
    expected = own_samples.load_or_sample(model, [[5, 6]], None, cache_dir=tmp_path / "good")
    found = own_samples.load_or_sample(model, [[5, 6]], None, say=lines.append)
    assert found == expected
    assert len(lines) == 1 and "can't be written" in lines[0] and "feature_cache_dir" in lines[0]
    with pytest.raises(QAdapterError, match="feature_cache_dir"):
        own_samples.load_or_sample(model, [[5, 6]], None, cache_dir=tmp_path / "file/mine")


def test_a_full_disk_does_not_lose_the_samples(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(own_samples._Cache, "write", full)
    lines = []
    found = own_samples.load_or_sample(build_model(), [[5, 6]], None, say=lines.append)
    assert found[0][1] and "No space left" in lines[0]


def test_default_settings_train_without_a_writable_cache(make_trainer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    lines = []
    trainer = make_trainer(
        train=build_pairs(8), retention_coef=None, retention_dataset=own_samples.OWN,
        say=lines.append,
    )
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.args.retention_coef > 0
    assert any("can't be written" in line for line in lines)


def test_an_output_folder_that_cannot_be_written(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QAdapterError, match="output_dir"):
        make_trainer(train=build_pairs(8), output_dir=str(tmp_path / "file/run"))


# --- what is there, but is not what was written ---------------------------------------------------

PROMPTS = [[5, 6], [7, 8, 9], [11]]


def drawn(cache, model=None, prompts=PROMPTS, say=None):
    return own_samples.load_or_sample(
        model or build_model(), prompts, build_tokenizer(), cache_dir=cache, say=say
    )


def counting(monkeypatch):
    calls, sample = [], own_samples._sample

    def counted(*args):
        calls.append(args)
        return sample(*args)

    monkeypatch.setattr(own_samples, "_sample", counted)
    return calls


WRONG_SAMPLES = {
    "beyond the vocabulary": lambda found: found["answers"][1].__setitem__(0, 10**6),
    "negative": lambda found: found["answers"][1].__setitem__(0, -1),
    "no ids": lambda found: found["answers"][1].__setitem__(0, "5"),
    "true": lambda found: found["answers"][1].__setitem__(0, True),
    "fractions": lambda found: found["answers"][1].__setitem__(0, 5.0),
    "too many": lambda found: found["answers"].append([5]),
    "too few": lambda found: found["answers"].pop(),
    "too long": lambda found: found["answers"][0].extend([5] * 64),
    "empty": lambda found: found["answers"][0].clear(),
    "others": lambda found: found["answers"].reverse(),
    "another token": lambda found: found["answers"][0].__setitem__(0, found["answers"][0][0] ^ 1),
    "of other prompts": lambda found: found.__setitem__("key", "0" * 32),
    "none": lambda found: found.clear(),
    "a list": None,
}


@pytest.mark.parametrize("vouched", [False, True])
@pytest.mark.parametrize("wrong", WRONG_SAMPLES)
def test_samples_that_are_none_are_drawn_again(tmp_path, monkeypatch, wrong, vouched):
    if vouched and wrong in ("others", "another token"):
        pytest.skip("no one can tell")
    expected, calls, lines = drawn(tmp_path), counting(monkeypatch), []
    [path] = tmp_path.glob("samples-*.json")
    found = json.loads(path.read_text())
    if wrong == "a list":
        found = found["answers"]
    else:
        WRONG_SAMPLES[wrong](found)
        found = sealed(found) if vouched else found
    path.write_text(json.dumps(found))
    assert drawn(tmp_path, say=lines.append) == expected
    assert len(calls) == 1 and [str(path) in line for line in lines] == [True]
    assert drawn(tmp_path) == expected and len(calls) == 1


@pytest.mark.parametrize("content", [
    b"", b"[", b"null", b"[" * 10_000, b"\xff\xfe", b"9" * 100_000, b'{"answers": NaN}',
])
def test_samples_cut_or_overwritten_are_drawn_again(tmp_path, monkeypatch, content):
    expected, calls = drawn(tmp_path), counting(monkeypatch)
    [path] = tmp_path.glob("samples-*.json")
    path.write_bytes(content)
    assert drawn(tmp_path) == expected and len(calls) == 1


def test_a_file_by_another_one_s_name_is_not_taken(tmp_path, monkeypatch):
    others = [[5, 6], [7, 8, 9], [12]]
    expected = drawn(tmp_path)
    [ours] = tmp_path.glob("samples-*.json")
    drawn(tmp_path, prompts=others)
    [theirs] = set(tmp_path.glob("samples-*.json")) - {ours}
    shutil.copy(theirs, ours)
    calls = counting(monkeypatch)
    assert drawn(tmp_path) == expected and len(calls) == 1


def test_samples_are_of_one_trunk_and_its_ends(tmp_path, monkeypatch):
    drawn(tmp_path)
    calls = counting(monkeypatch)
    other = build_model()
    with torch.no_grad():  # one number, which samples of tensors may miss; the same identity
        other.base.model.layers[0].mlp.up_proj.weight.view(-1)[77] += 1
    drawn(tmp_path, other)
    ended = build_model()
    ended.generation_config.eos_token_id = [3, 4]
    drawn(tmp_path, ended)
    assert len(calls) == 2


@pytest.mark.parametrize("record", [
    "[]", "null", '{"sha256": []}', "[" * 10_000, "9" * 10_000,
    lambda record: record.update(bytes="x"), lambda record: record.pop("sha256"),
    lambda record: record.update(format_version=[1]), lambda record: record.clear(),
])
def test_a_record_that_is_none_vouches_for_nothing(tmp_path, record):
    first = load(tmp_path)
    [path] = tmp_path.glob("*/features-*.json")
    if isinstance(record, str):
        path.write_text(record)
    else:
        found = json.loads(path.read_text())
        record(found)
        path.write_text(json.dumps(found))
    again = load(tmp_path)
    assert torch.equal(again.shards[0].hidden, first.shards[0].hidden)


@pytest.mark.parametrize("change", [
    lambda x: x | {"rows": x["rows"][:-1]}, lambda x: x | {"offsets": x["offsets"][1:]},
    lambda x: {k: v for k, v in x.items() if k != "tokens"},
    lambda x: x | {"more": x["rows"].clone()},
    lambda x: x | {"lengths": x["lengths"][None]},
])
def test_a_shard_that_its_record_vouches_for_but_is_another(tmp_path, change):
    first = load(tmp_path)
    [path], [shard] = tmp_path.glob("*/features-*.json"), tmp_path.glob("*/*.safetensors")
    save_file(change({name: x.clone() for name, x in load_file(shard).items()}), shard)
    record = json.loads(path.read_text())
    record |= {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    path.write_text(json.dumps(record))
    again = load(tmp_path)
    assert torch.equal(again.shards[0].hidden, first.shards[0].hidden)
