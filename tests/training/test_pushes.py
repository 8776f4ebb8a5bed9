"""``push_to_hub`` of training, from the command line, before a hub on this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from stub_hub import TOKEN, stub_hub
from tiny_models import cli, save_tiny_inputs

from qadapter import QAdapterModel

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
           "manifest.json", "qadapter_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("pushes"), pairs=12)


def train(place: Path, run: Path, *more) -> int:
    return cli(
        "train", "--model_name_or_path", place / "model", "--dataset_name", place / "pairs.jsonl",
        "--output_dir", run, "--max_steps", 2, "--save_steps", 1, "--answer_prompts", 0,
        "--bootstrap_resamples", 5, "--test_fraction", 0.3, "--retention_coef", 0,
        "--push_to_hub", "--hub_token", TOKEN, *more,
    )


@pytest.fixture(scope="module")
def pushed(place):
    with stub_hub() as hub:
        code = train(place, place / "run", "--hub_strategy", "checkpoint", "--hub_always_push",
                     "--hub_model_id", "org/mine")
        return hub, code


def test_a_run_is_sent_as_it_goes_and_when_it_is_measured(pushed, capsys):
    hub, code = pushed
    assert code == 0 and set(hub.repos) == {"org/mine"}
    *going, last = [(message, paths) for _, message, paths in hub.commits]
    assert sorted(message for message, _ in going) == [
        f"Training in progress, step {step}" for step in (1, 2)
    ]
    for _, paths in going:
        assert {path for path in paths if "/" not in path} == ADAPTER
        assert "last-checkpoint/optimizer.pt" in paths
        assert all(path in ADAPTER or path.startswith("last-checkpoint/") for path in paths)
    assert last == ("End of training", sorted(ADAPTER))


def test_it_loads_and_tells_of_no_token_and_no_place(pushed, place, tmp_path):
    files = {name: x for name, x in pushed[0].repos["org/mine"].items() if "/" not in name}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert str(place).encode() not in content, name
    assert QAdapterModel.from_pretrained(tmp_path, place / "model").adapts_trunk
    for path in (place / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_the_card_says_what_was_measured(pushed):
    text = pushed[0].repos["org/mine"]["README.md"].decode()
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    [model] = header["model-index"]
    [metric] = model["results"][0]["metrics"]
    assert model["name"] == "org/mine" and metric["type"] == "accuracy"
    assert 0 <= metric["value"] <= 1
    assert 'from_pretrained("org/mine")' in text and "datasets" not in header


@pytest.mark.parametrize("refused", ["commit", "create"])
def test_what_can_not_be_sent_loses_nothing(place, tmp_path, capfd, refused):
    with stub_hub() as hub:
        hub.refused = {refused: 403}
        code = train(place, tmp_path / "run", "--hub_strategy", "end")
    line = capfd.readouterr().err.splitlines()[-1]
    assert code == 2 and line.startswith("error: push_to_hub: ") and TOKEN not in line
    if refused == "create":  # before any work
        assert "nothing was sent" in line and not (tmp_path / "run/report.md").exists()
        return
    assert f"the adapter is saved in {tmp_path / 'run'}" in line and "me/run" in line
    for name in ("adapter_model.safetensors", "summary.json", "report.html", "README.md"):
        assert (tmp_path / "run" / name).is_file(), name


def test_a_push_that_fails_on_the_way_ends_no_training(place, tmp_path, capfd):
    with stub_hub() as hub:
        hub.refused = {"preupload": 403}
        code = train(place, tmp_path / "run", "--hub_always_push")
    shown = capfd.readouterr()
    assert code == 2 and (tmp_path / "run/report.html").is_file()
    assert shown.err.splitlines()[-1].startswith("error: push_to_hub: me/run: ")
