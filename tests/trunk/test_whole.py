"""Bases of which something is missing, cut, exchanged or not a number are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from data.tiny import chatml
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_base
from transformers import BertConfig, BertModel

from qadapter import QAdapterError, QAdapterModel
from qadapter.system import manifest
from qadapter.trunk.loading import load_base, load_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_base().save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def base(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "base"))


def shard_with(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(folder: Path, name: str, to) -> None:
    path = shard_with(folder, name)
    tensors = {key: x.clone() for key, x in load_file(path).items()}
    tensor = tensors.pop(name)
    save_file(tensors if to is None else tensors | to(tensor), path, metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mamba", *ARCHITECTURES])
def test_what_is_tied_or_computed_is_not_missing(tmp_path, architecture):
    for number, tied in enumerate((False, True)):
        model = tiny_base(architecture, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(number))
        loaded = load_base(tmp_path / str(number), dtype="checkpoint").model
        ids = torch.tensor([[5, 9, 11]])
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


GATE, NORM = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"


@pytest.mark.parametrize("name", [GATE, NORM, "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(base, name):
    change(base, name, None)
    with pytest.raises(QAdapterError, match="is not whole: no file of it holds") as raised:
        load_base(base)
    assert name in str(raised.value) and str(base) in str(raised.value)


def test_a_tensor_by_another_name_is_missing(base):
    change(base, GATE, lambda x: {f"{GATE}_": x})
    with pytest.raises(QAdapterError, match=rf"holds {GATE}"):
        load_base(base)


def test_a_missing_layer_is_told_in_one_line(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 40}))
    message = r"holds model\.layers\.10\.\S+, .* and \d+ more"
    with pytest.raises(QAdapterError, match=message) as raised:
        load_base(base)
    assert len(str(raised.value)) < 400


def test_another_shape_is_no_reason_for_random_numbers(base):
    change(base, GATE, lambda x: {GATE: x[:-1].contiguous()})
    with pytest.raises(QAdapterError, match=rf"{GATE}' of shape \[47, 32\], but .* \[48, 32\]"):
        load_base(base)
    with pytest.raises(QAdapterError, match=rf"{GATE}.* another shape"):
        load_base(base, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [GATE, NORM])
def test_numbers_that_are_none(base, name, number):
    change(base, name, lambda x: {name: x.index_fill(0, torch.tensor([3]), number)})
    if (name, number) == (NORM, float("-inf")):
        return  # what a bias that masks looks like
    with pytest.raises(QAdapterError, match=rf"{name} \(float32\) holds NaN or infinite"):
        load_base(base)


def test_numbers_that_only_a_wider_dtype_holds(base):
    change(base, GATE, lambda x: {GATE: x * 1e6})
    load_base(base)
    with pytest.raises(QAdapterError, match=rf"{GATE} \(float16\) holds .*don't fit this dtype"):
        load_base(base, dtype=torch.float16)


def test_a_model_object_is_looked_at_too():
    model = tiny_base("phi")
    model.lm_head.bias.data[5] = float("-inf")  # a token taken out
    QAdapterModel.from_base(model)
    model.model.layers[0].mlp.fc1.bias.data[0] = float("nan")
    with pytest.raises(QAdapterError, match=r"layers\.0\.mlp\.fc1\.bias"):
        QAdapterModel.from_base(model)


@pytest.mark.parametrize("damage", [
    lambda content: content[:-40], lambda content: b"", lambda content: content[:100],
    lambda content: bytes(len(content)),
], ids=["cut", "empty", "begun", "zeros"])
def test_a_damaged_file_is_named(base, damage):
    for path in (base / "config.json", base / INDEX, shard_with(base, GATE)):
        content = path.read_bytes()
        path.write_bytes(damage(content))
        with pytest.raises(QAdapterError) as raised:
            load_base(base)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        path.write_bytes(content)
    load_base(base)


@pytest.mark.parametrize("content", [b"", b'{"eos_token_id": 1', b"[1]", b"\xff\xfe{}", None])
def test_settings_of_generation_are_read_or_named(base, content):
    """transformers goes on without what it can't read, and so without what ends an answer."""
    path = base / "generation_config.json"
    path.unlink(missing_ok=True)
    load_base(base)
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(QAdapterError, match=path.name):
        load_base(base)


def test_a_missing_shard_is_named(base):
    path = shard_with(base, GATE)
    path.unlink()
    with pytest.raises(QAdapterError, match=path.name):
        load_base(base)


def test_a_damaged_tokenizer_is_named(base):
    (base / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(QAdapterError, match=r"tokenizer\.json"):
        load_tokenizer(base)
    chatml().save_pretrained(base)
    (base / "chat_template.jinja").write_bytes(b"{{ messages }}\xe1(")
    with pytest.raises(QAdapterError, match=r"chat_template\.jinja:1 is not UTF-8"):
        load_tokenizer(base)
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer.json").unlink()
    with pytest.raises(QAdapterError, match=r"tokenizer of .* from one of: "):
        load_tokenizer(base)


def test_weights_without_a_head_are_not_a_language_model(tmp_path):
    tiny_base(tie_word_embeddings=False).model.save_pretrained(tmp_path / "body")
    with pytest.raises(QAdapterError, match=r"holds lm_head\.weight"):
        load_base(tmp_path / "body")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=96, num_hidden_layers=1, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(QAdapterError, match=str(tmp_path)):
        load_base(tmp_path / "bert")


def test_a_base_with_a_manifest_is_held_against_it(base):
    names = [path.name for path in base.iterdir()]
    manifest.write(base, names)
    load_base(base)
    for name in names:
        content = (base / name).read_bytes()
        (base / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(QAdapterError, match=rf"{name} is not what was saved"):
            load_base(base)
        (base / name).write_bytes(content)
    (base / "manifest.json").write_text('{"pages": ["of another tool"]}')
    load_base(base)
