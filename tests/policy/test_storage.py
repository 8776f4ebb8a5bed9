"""Adapters on disk: what is written comes back, what is wrong is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_base

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.adapters.head_adapter import HEAD_FORMS
from qadapter.policy import storage
from qadapter.system import manifest

IDS = torch.tensor([[5, 9, 11, 3, 20, 7]])
OBJECTIVE = ObjectiveConfig(alpha_0=0.5, alpha_tilde=2.0, gamma=0.9, bootstrap="current")
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
ADAPTERS = {
    **{form: AdapterConfig(form=form, rank=rank) for rank, form in enumerate(HEAD_FORMS, 3)},
    "lora": LORA,
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "rslora": peft.LoraConfig(
        r=4, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3},
    ),
    "norms": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
}


def trained(adapter, seed=0, **base) -> QAdapterModel:
    model = QAdapterModel.from_base(tiny_base(seed=seed, **base), adapter, OBJECTIVE).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_round_trip(tmp_path, name):
    model = trained(ADAPTERS[name])
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    expected = {"adapter_model.safetensors", "qadapter_config.json", "manifest.json",
                    "README.md"}
    assert files == expected | ({"adapter_config.json"} if model.adapts_trunk else set())
    loaded = QAdapterModel.from_pretrained(tmp_path, tiny_base()).eval()
    assert loaded.objective == OBJECTIVE
    assert storage.describe(loaded.adapter_config) == storage.describe(model.adapter_config)
    for strength in (0.0, 1.0, 0.6):
        ours, theirs = (m(IDS, strength=strength).logits for m in (model, loaded))
        assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = QAdapterModel.from_pretrained(tmp_path, tiny_base(), is_trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) == len(list(model.adapter.parameters()))


@pytest.mark.parametrize("name", ["linear", "lora"])
def test_gathered_state_dict(tmp_path, name):
    """What a trainer gathered is written, not what the model holds now."""
    model = trained(ADAPTERS[name])
    gathered = {key: x.clone() for key, x in model.state_dict().items()}
    logits = model(IDS).logits
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert torch.equal(QAdapterModel.from_pretrained(tmp_path, tiny_base())(IDS).logits, logits)


def test_other_processes_write_nothing(tmp_path):
    trained(ADAPTERS["linear"]).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_base_is_found_by_the_saved_name(tmp_path):
    base = tmp_path / "base"
    tiny_base().save_pretrained(base)
    model = QAdapterModel.from_base(base, LORA)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        QAdapterModel.from_pretrained(tmp_path / "adapter")(IDS).logits, model(IDS).logits
    )


@pytest.mark.parametrize("name", ["linear", "lora"])
def test_another_base_is_refused_with_both_names(tmp_path, name):
    for folder, seed in (("ours", 0), ("theirs", 1)):
        tiny_base(seed=seed).save_pretrained(tmp_path / folder)
    QAdapterModel.from_base(tmp_path / "ours", ADAPTERS[name]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(QAdapterError, match="head differ") as error:
        QAdapterModel.from_pretrained(tmp_path / "adapter", tmp_path / "theirs")
    assert str(tmp_path / "ours") in str(error.value)
    assert str(tmp_path / "theirs") in str(error.value)


def test_another_configuration_is_refused(tmp_path):
    trained(ADAPTERS["linear"]).save_pretrained(tmp_path)
    other = tiny_base()
    other.config.rms_norm_eps = 1e-3
    with pytest.raises(QAdapterError, match=r"config \(rms_norm_eps: 1e-06 there, 0.001 here\)"):
        QAdapterModel.from_pretrained(tmp_path, other)


@pytest.mark.parametrize("change", [
    {"pad_token_id": 7, "eos_token_id": [2, 3], "bos_token_id": None}, {"use_cache": False},
    {"some_tool_version": "2026.1"}, {"attention_dropout": 0.1}, {"max_position_embeddings": 512},
    {"transformers_version": "5.0.0"}, {"architectures": ["Other"]}, {"initializer_range": 0.5},
    {"id2label": {0: "yes"}},
], ids=lambda change: next(iter(change)))
def test_what_changes_no_number_is_accepted_both_ways(tmp_path, change):
    plain, changed = tiny_base(), tiny_base()
    for name, value in change.items():
        setattr(changed.config, name, value)
    for number, (first, second) in enumerate([(plain, changed), (changed, plain)]):
        folder = tmp_path / str(number)
        QAdapterModel.from_base(copy.deepcopy(first)).save_pretrained(folder)
        QAdapterModel.from_pretrained(folder, copy.deepcopy(second))


def test_another_trunk_is_refused(tmp_path):
    """With the same head and configuration: a model that was trained further."""
    QAdapterModel.from_base(tiny_base("phi")).save_pretrained(tmp_path)
    other = tiny_base("phi")
    other.model.layers[1].self_attn.q_proj.weight.data.mul_(1.05)
    with pytest.raises(QAdapterError, match="its trunk's weights differ"):
        QAdapterModel.from_pretrained(tmp_path, other)
    QAdapterModel.from_pretrained(tmp_path, tiny_base("phi").to(torch.bfloat16))


def test_adapters_saved_before_are_known_by_their_base_s_head(tmp_path):
    trained(ADAPTERS["linear"]).save_pretrained(tmp_path)
    path = tmp_path / "qadapter_config.json"
    description = json.loads(path.read_text())
    base = {k: description["base"][k] for k in ("name", "revision", "head_sha256")}
    base["config_sha256"] = "of transformers 5.23"
    path.write_text(json.dumps(description | {"format_version": 1, "base": base}))
    manifest.remove(tmp_path)
    model = QAdapterModel.from_pretrained(tmp_path, tiny_base())
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/qadapter_config.json").read_text())
    assert again["format_version"] == 3 and again["base"]["weights_sha256"]
    with pytest.raises(QAdapterError, match="its head differ"):
        QAdapterModel.from_pretrained(tmp_path, tiny_base(seed=1))


def test_same_base_in_another_dtype_is_accepted(tmp_path):
    tiny_base().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    QAdapterModel.from_base(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    loaded = QAdapterModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert loaded.base.dtype == torch.float32


# --- damage ---------------------------------------------------------------------------------


@pytest.fixture(params=["linear", "lora"])
def saved(tmp_path, request) -> Path:
    trained(ADAPTERS[request.param]).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path):
    return QAdapterModel.from_pretrained(folder, tiny_base())


def vouch(folder: Path) -> None:
    """Say that the files of an adapter are as they should be, whatever they are."""
    manifest.write(folder, [n for n in names_of(folder) if n != "manifest.json"])


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_missing_files(saved):
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(QAdapterError, match=r"adapter_model\.safetensors is missing"):
        load(saved)
    (saved / "qadapter_config.json").unlink()
    with pytest.raises(QAdapterError, match=r"qadapter_config\.json"):
        load(saved)


def test_no_such_folder(tmp_path):
    with pytest.raises(QAdapterError, match="no such folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_weights(saved, damage):
    path = saved / "adapter_model.safetensors"
    content = {"cut": path.read_bytes()[:-8], "empty": b"", "text": b"not tensors at all"}[damage]
    path.write_bytes(content)
    with pytest.raises(QAdapterError, match=r"adapter_model\.safetensors is not what was saved"):
        load(saved)
    vouch(saved)
    with pytest.raises(QAdapterError, match=r"adapter_model\.safetensors: damaged"):
        load(saved)


def test_weights_of_another_shape_or_name(saved):
    path = saved / "adapter_model.safetensors"
    weights = {name: x.clone() for name, x in load_file(path).items()}  # not mapped: it is replaced
    name = next(iter(weights))
    for wrong in (weights | {name: weights[name][:, :1].contiguous()},
                  weights | {"extra": torch.zeros(1)},
                  {k: v for k, v in weights.items() if k != name}):
        save_file(wrong, path)
        vouch(saved)
        with pytest.raises(QAdapterError, match="but its configuration describes"):
            load(saved)


@pytest.mark.parametrize(
    "change, message",
    [({"format_version": 99}, "format version 99"), ({"objective": {"alpha_0": -1}}, "alpha_0"),
     ({"adapter": {"kind": "head", "form": "cube"}}, "cube"), ({"base": {}}, "not a Q-Adapter")],
)
def test_wrong_configuration(saved, change, message):
    path = saved / "qadapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    vouch(saved)
    with pytest.raises(QAdapterError, match=message):
        load(saved)
    path.write_text("{ not json")
    vouch(saved)
    with pytest.raises(QAdapterError, match=r"qadapter_config\.json:1 is not JSON"):
        load(saved)


def test_folder_that_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QAdapterError, match="can't be saved"):
        trained(ADAPTERS["lora"]).save_pretrained(tmp_path / "file" / "adapter")


def test_a_failed_save_leaves_the_old_files(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(QAdapterError, match="No space left"):
        trained(ADAPTERS["lora"], seed=0).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


# --- PEFT's own adapters --------------------------------------------------------------------


def test_the_folder_is_a_peft_adapter(tmp_path):
    """Stock PEFT loads it as the adapted stream, here the customised policy itself."""
    model = trained(LORA)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_base(), tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"]


def test_a_peft_adapter_of_the_authors_loads_as_q(tmp_path):
    theirs = peft.get_peft_model(
        tiny_base(), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_alpha=16)
    )
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(QAdapterError, match=r"ObjectiveConfig\.authors"):
        load(tmp_path)
    model = QAdapterModel.from_pretrained(
        tmp_path, tiny_base(), objective=ObjectiveConfig.authors()
    ).eval()
    q, log_pi = theirs.eval()(IDS).logits, tiny_base()(IDS).logits.log_softmax(-1)
    expected = (q + 0.01 * log_pi).log_softmax(-1)
    torch.testing.assert_close(model(IDS).logits.log_softmax(-1), expected, atol=1e-4, rtol=0)


def test_our_own_adapters_keep_their_objective(saved):
    with pytest.raises(QAdapterError, match="trained with another objective"):
        QAdapterModel.from_pretrained(saved, tiny_base(), objective=ObjectiveConfig.authors())
    assert QAdapterModel.from_pretrained(saved, tiny_base(), objective=OBJECTIVE)
