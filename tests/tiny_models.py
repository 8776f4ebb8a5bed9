"""A tiny chat model on disk and preferences for it: what the command line is tested with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from data.tiny import chatml
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qadapter import AdapterConfig, QAdapterModel
from qadapter.cli import main
from qadapter.data import as_preferences, tokenize_preferences
from qadapter.policy.decoding import CONTINUOUS_BATCHING

batches_continuously = pytest.mark.skipif(
    Version(transformers.__version__) < Version(CONTINUOUS_BATCHING),
    reason=f"continuous batching needs transformers {CONTINUOUS_BATCHING}",
)
WORDS = ("blue", "green", "red", "hot", "short", "always", "never", "maybe")


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama with two layers; its logits spread enough for answers to differ."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "initializer_range": 0.3, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


ARCHITECTURES = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "phi": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24},
}
"""Architectures and what is peculiar to each: a cap, a window, a bias, a scale, experts."""


def tiny_base(architecture: str = "llama", seed: int = 0, **changes):
    """A random model of an architecture; it never ends an answer by itself."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    }
    if architecture not in ("phi", "gpt_neox"):
        settings["num_key_value_heads"] = 2
    config = AutoConfig.for_model(
        architecture, **settings | ARCHITECTURES.get(architecture, {}) | changes
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    if getattr(base.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(base.get_output_embeddings().bias)
    return base


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """The model and its tokenizer, as a folder that ``from_pretrained`` loads."""
    tiny_llama(seed).save_pretrained(folder)
    chatml().save_pretrained(folder)
    return folder


def preference_rows(count: int = 16) -> list[dict]:
    """Questions whose better answer is the shorter one, two pairs to each prompt."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {WORDS[i // 2 % 8]} {i // 2}?"}],
            "chosen": [{"role": "assistant", "content": f"Yes, {WORDS[i % 8]}."}],
            "rejected": [{"role": "assistant",
                          "content": f"I think so, {WORDS[(i + 3) % 8]} and {WORDS[i % 8]}."}],
        }
        for i in range(count)
    ]


def cli(*arguments) -> int:
    """The exit code of ``qadapter ARGUMENTS``."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return end.value.code


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_tiny_inputs(folder: Path, pairs: int) -> Path:
    """What ``train`` takes: a folder with ``model`` and ``pairs.jsonl``."""
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(pairs))
    return folder


def tokenized(count: int = 16):
    return tokenize_preferences(as_preferences(preference_rows(count)), chatml()).dataset


def tiny_adapter(trained: bool, form: str = "linear", objective=None) -> QAdapterModel:
    """On ``tiny_llama()``; ``trained``: an adapter that does something."""
    model = QAdapterModel.from_base(tiny_llama(), AdapterConfig(form=form, rank=4), objective)
    if trained:
        torch.manual_seed(1)
        torch.nn.init.normal_(model.adapter.up.weight, std=0.2)
    return model
