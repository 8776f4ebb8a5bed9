"""The command line on data that is not read before training, and features that are made alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import cli, preference_rows, save_tiny, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(24))
    write_jsonl(folder / "held_out.jsonl", preference_rows(4))
    return folder


def train(place, name, *flags):
    return cli(
        "train", "--model_name_or_path", place / "model", "--dataset_name", place / "pairs.jsonl",
        "--max_steps", 6, "--learning_rate", "1e-2", "--adapter_kind", "head", "--save_steps", 3,
        "--answer_prompts", 0, "--bootstrap_resamples", 5, "--per_device_train_batch_size", 4,
        "--output_dir", place / name, *flags,
    )


def weights(place, name):
    return load_file(place / name / "adapter_model.safetensors")


def test_streaming_trains_and_goes_on(place):
    """Pairs whose prompt is held out are not trained on."""
    flags = ("--streaming", "--shuffle_buffer", 5, "--test_dataset_name",
             place / "held_out.jsonl")
    assert train(place, "whole", *flags) == 0
    summary = json.loads((place / "whole/summary.json").read_text())
    assert summary["data"]["train"]["kept"] == summary["data"]["train"]["total"] >= 24
    assert summary["data"]["eval"]["kept"] == 4
    for path in (place / "whole").iterdir():
        if path.is_file() and path.name != "training_args.json":
            path.unlink()
    expected = load_file(place / "whole/checkpoint-6/adapter_model.safetensors")
    (place / "whole/checkpoint-6/manifest.json").unlink()
    assert train(place, "whole", *flags, "--resume_from_checkpoint", "true") == 0
    found = weights(place, "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("flags, words", [
    (("--streaming", "--max_steps", -1), "max_steps"),
    (("--streaming", "--test_fraction", 0.2), "test_dataset_name"),
    (("--streaming", "--max_rows", 3), "max_rows"),
    (("--streaming", "--cache_features", "disk"), "cache_features disk"),
    (("--shuffle_buffer", 3), "shuffle_buffer is for streaming"),
    (("--features_only", "--cache_features", "none"), "not with cache_features none"),
    (("--features_only", "--streaming"), "features_only does not go with streaming"),
    (("--features_only", "--resume_from_checkpoint", "x"), "resume_from_checkpoint"),
])
def test_what_does_not_go_together(place, capfd, flags, words):
    assert train(place, "refused", *flags) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_features_that_are_made_alone_are_those_of_a_run(place, capfd, monkeypatch):
    cache = ("--feature_cache_dir", place / "features", "--cache_features", "disk")
    assert train(place, "features-run", *cache, "--features_only") == 0
    assert not (place / "features-run").exists()
    assert "train by the same command" in capfd.readouterr().out
    shards = {path: path.stat().st_mtime_ns for path in (place / "features").rglob("*.safetensors")}
    assert shards
    monkeypatch.setattr("qadapter.training.feature_store.compute_shard", None)
    assert train(place, "features-run", *cache) == 0
    assert shards == {p: p.stat().st_mtime_ns for p in (place / "features").rglob("*.safetensors")}
