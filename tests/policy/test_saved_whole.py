"""Saved adapters are whole or refused: what is cut, flipped, swapped, missing or half saved."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from tiny_models import tiny_base

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.policy import storage
from qadapter.policy.composition import compose
from qadapter.system import manifest

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ADAPTERS = {
    "head": AdapterConfig(form="mlp", rank=3),
    "block": AdapterConfig(form="block", rank=3),
    "lora": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
}


def random_adapter(kind: str, seed: int = 0, objective: ObjectiveConfig | None = None):
    model = QAdapterModel.from_base(tiny_base(), ADAPTERS[kind], objective)
    torch.manual_seed(seed)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.chat_template = CHAT
    return model.requires_grad_(False)


def composition():
    return compose([random_adapter("lora", seed) for seed in (1, 2)], (0.4, 0.6))


@pytest.fixture(params=["head", "lora", "composition"])
def saved(tmp_path, request) -> Path:
    model = composition() if request.param == "composition" else random_adapter(request.param)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder: Path) -> QAdapterModel:
    return QAdapterModel.from_pretrained(folder, tiny_base())


def files_of(folder: Path) -> list[Path]:
    """All but the cards, which people edit."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


@pytest.mark.parametrize("damage", [
    lambda content: content[: len(content) // 2], lambda content: b"",
    lambda content: flipped(content, len(content) // 3),
    lambda content: flipped(content, len(content) - 2),
    lambda content: content[:-16] + bytes(16), lambda content: content + b"x", None,
], ids=["half", "empty", "flipped", "flipped at the end", "zeros", "longer", "missing"])
def test_every_file_of_an_adapter_is_held_against_the_manifest(saved, damage):
    for path in files_of(saved):
        content = path.read_bytes()
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(content))
        with pytest.raises(QAdapterError) as raised:
            load(saved)
        line = str(raised.value)
        assert path.name in line and str(saved) in line and "\n" not in line
        path.write_bytes(content)
    assert load(saved).chat_template == CHAT


@pytest.mark.parametrize("kind", ["head", "lora"])
def test_files_of_another_adapter_of_the_same_shapes_are_noticed(tmp_path, kind):
    for seed, objective in ((0, None), (1, ObjectiveConfig.authors())):
        random_adapter(kind, seed, objective).save_pretrained(tmp_path / str(seed))
    for name in (storage.WEIGHTS_NAME, storage.CONFIG_NAME):
        kept = (tmp_path / "0" / name).read_bytes()
        shutil.copy(tmp_path / "1" / name, tmp_path / "0" / name)
        with pytest.raises(QAdapterError, match=rf"{name} is not what was saved"):
            load(tmp_path / "0")
        (tmp_path / "0" / name).write_bytes(kept)
    load(tmp_path / "0")


def test_parts_of_a_composition_keep_their_places(tmp_path):
    composition().save_pretrained(tmp_path)
    for source, target in (("adapter-0", "kept"), ("adapter-1", "adapter-0"),
                           ("kept", "adapter-1")):
        (tmp_path / source).rename(tmp_path / target)
    load(tmp_path / "adapter-0")  # each by itself is whole
    with pytest.raises(QAdapterError, match=r"adapter-0/manifest\.json is not what was saved"):
        load(tmp_path)


class Stopped(BaseException):
    """As if the process had been killed: no cleaning up that counts on an Exception."""


@pytest.mark.parametrize("format_version", [2, 3])
@pytest.mark.parametrize("kind", ["head", "lora", "composition"])
def test_an_adapter_written_over_another_is_never_half_of_each(
    tmp_path, monkeypatch, kind, format_version
):
    """Stopped before each of its changes: what is loaded is the old one or the new one, whole."""
    if kind == "composition":
        old, new = composition(), composition()
        for part in new.parts:
            for x in part.weights.values():
                x.mul_(2)
    else:
        old, new = random_adapter(kind), random_adapter(kind, 1, ObjectiveConfig.authors())
    expected = {(m.objective.alpha_0, str(weights_of(m))) for m in (old, new)}
    outcomes, done = [], False
    while not done:
        folder = tmp_path / str(len(outcomes))
        old.save_pretrained(folder)
        if format_version == 2:
            as_format_2(folder)
        with monkeypatch.context() as patch:
            stop_after(len(outcomes), patch)
            try:
                new.save_pretrained(folder)
                done = True
            except Stopped:
                pass
        try:
            loaded = load(folder)
        except QAdapterError as error:
            outcomes.append("refused")
            assert not done and str(folder) in str(error)
            continue
        outcomes.append("loaded")
        assert (loaded.objective.alpha_0, str(weights_of(loaded))) in expected
    assert outcomes[0] == outcomes[-1] == "loaded" and "refused" in outcomes


def stop_after(number: int, patch: pytest.MonkeyPatch) -> None:
    """So many files are replaced or deleted, and no more."""
    changes = itertools.count()

    def counted(call):
        def change(*args, **kwargs):
            if next(changes) == number:
                raise Stopped
            return call(*args, **kwargs)
        return change

    patch.setattr(os, "replace", counted(os.replace))
    patch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "chat_template.jinja"])
def test_a_folder_in_a_file_s_place_costs_nothing(tmp_path, name):
    (tmp_path / name).mkdir()
    kept = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(QAdapterError, match=rf"can't be saved: .*Is a directory: .*{name}"):
        random_adapter("head").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def weights_of(model) -> list[float]:
    parts = [part.weights for part in model.parts] if hasattr(model, "parts") else [
        model.adapter.state_dict()
    ]
    return [float(x.double().sum()) for weights in parts for _, x in sorted(weights.items())]


def as_format_2(folder: Path) -> None:
    """As it was saved before there were manifests."""
    for path in folder.rglob("manifest.json"):
        path.unlink()
    for path in folder.rglob(storage.CONFIG_NAME):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))


def test_adapters_saved_before_have_no_manifest(saved):
    as_format_2(saved)
    assert load(saved).chat_template == CHAT


def test_what_was_never_finished_says_so(saved):
    manifest.remove(saved)
    with pytest.raises(QAdapterError, match=r"manifest\.json is missing: saving it was never"):
        load(saved)


def test_a_lora_without_our_configuration_is_no_plain_peft_adapter(tmp_path):
    random_adapter("lora").save_pretrained(tmp_path)
    (tmp_path / storage.CONFIG_NAME).unlink()
    with pytest.raises(QAdapterError, match=r"qadapter_config\.json is missing"):
        QAdapterModel.from_pretrained(tmp_path, tiny_base(), objective=ObjectiveConfig())
    for text in ("{}", json.dumps({"files": ["pages"]})):  # of some other tool
        (tmp_path / "manifest.json").write_text(text)
        QAdapterModel.from_pretrained(tmp_path, tiny_base(), objective=ObjectiveConfig())


def test_a_chat_template_of_an_adapter_before_is_not_taken(tmp_path):
    model = random_adapter("head")
    model.save_pretrained(tmp_path)
    model.chat_template = None
    model.save_pretrained(tmp_path)
    assert load(tmp_path).chat_template is None
    assert storage.read_chat_template(tmp_path) is None


def test_a_chat_template_that_the_manifest_lost_is_missed(saved):
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace("chat_template", "cha4_template"))
    with pytest.raises(QAdapterError, match=r"manifest\.json lists no chat_template\.jinja"):
        load(saved)


def test_a_repository_of_the_hub_is_held_against_its_manifest(tmp_path, monkeypatch, saved):
    def download(repo, name):
        assert repo == "someone/adapter"
        if not (saved / name).is_file():
            raise FileNotFoundError(name)
        return str(saved / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert load("someone/adapter").chat_template == CHAT
    path = saved / storage.CONFIG_NAME
    path.write_bytes(flipped(path.read_bytes(), 40))
    with pytest.raises(QAdapterError, match="is not what was saved"):
        load("someone/adapter")
    (saved / "manifest.json").unlink()
    path.write_bytes(flipped(path.read_bytes(), 40))
    with pytest.raises(QAdapterError, match=r"manifest\.json is missing"):
        load("someone/adapter")
