"""Configurations and tokenizers that transformers 4 reads as version 5 does.

What version 4 makes of them can't be tried beside version 5; it was, by hand, with 4.57.6 on these
architectures: logits equal to the last digits.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from data.tiny import chatml
from tiny_models import tiny_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qadapter.trunk.older_names import add_older_names, add_older_tokenizer

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONGROPE = {**FACTORS, "original_max_position_embeddings": 64}
IDS = torch.tensor([[5, 9, 11, 3, 20, 7, 33, 2, 90]])


def rope(kind: str, **others):
    return {"rope_type": kind, "rope_theta": 777.0, **others}


def scaling(kind: str, **others):
    return {"rope_theta": 777.0, "rope_scaling": {"rope_type": kind, **others}}


CASES = {
    "default": ("llama", rope("default"), {"rope_theta": 777.0}),
    "linear": ("qwen2", rope("linear", factor=4.0), scaling("linear", factor=4.0)),
    "dynamic": ("llama", rope("dynamic", factor=4.0), scaling("dynamic", factor=4.0)),
    "llama3": ("llama", rope("llama3", **LLAMA3), scaling("llama3", **LLAMA3)),
    "yarn": (
        "qwen3", rope("yarn", factor=4.0, original_max_position_embeddings=32),
        scaling("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "longrope": ("llama", rope("longrope", factor=2.0, **LONGROPE), {
        **scaling("longrope", factor=2.0, **LONGROPE), "original_max_position_embeddings": 64,
    }),
    "Phi-3's": ("phi3", rope("longrope", **LONGROPE), {
        "rope_theta": 777.0, "rope_scaling": {"type": "longrope", **FACTORS},
        "original_max_position_embeddings": 64,
    }),
    "partial": ("stablelm", rope("default", partial_rotary_factor=0.5), {
        "rope_theta": 777.0, "partial_rotary_factor": 0.5,
    }),
    "GPT-NeoX's": ("gpt_neox", rope("default", partial_rotary_factor=0.5), {
        "rotary_emb_base": 777.0, "rotary_pct": 0.5,
    }),
    "Gemma 3's": ("gemma3_text", {
        "full_attention": rope("linear", factor=8.0),
        "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
    }, {**scaling("linear", factor=8.0), "rope_local_base_freq": 55.0}),
}


def saved(folder, architecture, parameters):
    """(its configuration as version 5 has it, a model of it)"""
    more = {}
    if architecture == "gemma3_text":
        more = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    if architecture == "phi3":
        more = {"original_max_position_embeddings": 64}
    base = tiny_base(architecture, rope_parameters=copy.deepcopy(parameters), **more)
    base.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder), base


def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_rotary_positions_have_both_names(case, tmp_path):
    architecture, parameters, expected = CASES[case]
    config, base = saved(tmp_path, architecture, parameters)
    assert add_older_names(tmp_path, type(config))
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written.get(name) for name in expected} == expected
    assert ("rope_scaling" in written) == ("rope_scaling" in expected)
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert torch.equal(logits(tmp_path), base(IDS).logits)
    # As an older file would: version 5 reads the old names alone.
    for name in ("rope_parameters", "dtype"):
        written.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert torch.equal(logits(tmp_path), base(IDS).logits)


def test_names_that_changed_sides(tmp_path):
    base = tiny_base("qwen3_moe")
    base.save_pretrained(tmp_path)
    assert add_older_names(tmp_path, type(base.config))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == 4


def test_a_model_without_rotary_positions(tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=96)
    config.save_pretrained(tmp_path)
    assert add_older_names(tmp_path, type(config))
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())


def test_what_older_names_can_not_say(tmp_path):
    """Positions stretched in the layers that see a window: version 5 still reads its own names."""
    config, base = saved(tmp_path, "gemma3_text", {
        "full_attention": rope("default"), "sliding_attention": rope("linear", factor=2.0),
    })
    assert not add_older_names(tmp_path, type(config))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    assert torch.equal(logits(tmp_path), base(IDS).logits)


# --- tokenizers ---------------------------------------------------------------------------------


def characters():
    """A vocabulary such as sentencepiece's, and its merges."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"Helowrd,.x", "▁H", "el"]
    return {piece: i for i, piece in enumerate(pieces)}, [("▁", "H"), ("e", "l")]


def tokenizers():
    vocabulary, merges = characters()
    special = {"<pad>": 300, "<eos>": 301, "<bos>": 302, "<mask>": 303}
    return {
        "general": chatml(),
        "with more special tokens": chatml_with(["<tool>"]),
        "Llama's without a beginning": transformers.LlamaTokenizer(
            vocab=vocabulary, merges=merges, add_bos_token=False
        ),
        "Llama's with an end": transformers.LlamaTokenizer(
            vocab=vocabulary, merges=merges, add_eos_token=True
        ),
        "Gemma's": transformers.GemmaTokenizer(vocab={**special, **vocabulary}, merges=merges),
    }


def chatml_with(tokens):
    tokenizer = chatml()
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    return tokenizer


@pytest.mark.parametrize("name", tokenizers())
def test_a_tokenizer_is_its_file(name, tmp_path):
    tokenizer = tokenizers()[name]
    tokenizer.save_pretrained(tmp_path)
    add_older_tokenizer(tmp_path, tokenizer)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in fields  # a list is an error there
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello world, x.", "<|im_start|>user <tool>", "</s> <eos>"):
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert set(loaded.all_special_tokens) == set(tokenizer.all_special_tokens)
    for of_the_class in ("padding_side", "truncation_side", "model_input_names"):
        assert fields[of_the_class] == getattr(tokenizer, of_the_class)
        assert getattr(loaded, of_the_class) == getattr(tokenizer, of_the_class)


def test_a_tokenizer_of_other_code_is_left_alone(tmp_path):
    tokenizer = chatml()
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(fields))
    add_older_tokenizer(tmp_path, tokenizer)
    assert json.loads(path.read_text()) == fields
