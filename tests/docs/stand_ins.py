"""What stands in, on this machine, for what the pages name: the only place to add to.

A page's blocks run in a folder that holds ``model/`` (a tiny chat model), ``pairs.jsonl``,
``held_out.jsonl``, ``test.jsonl``, ``texts.txt``, ``texts.jsonl``, ``prompts.txt``,
``prompts.jsonl`` and ``runs/mine`` (a run trained on them).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import authors_run
import peft
import torch
from pages import ROOT
from tiny_models import save_tiny, tiny_llama

NAMES = {
    "meta-llama/Llama-3.1-8B-Instruct": "model",
    "NAME": "model",
    "BASE": "model",
    "/shared/features": "features",
    "runs/demo": "runs/mine",
}
"""Written in a command, a word of its own, or in Python, a string: what is there."""

SHORTER = {
    "train": (
        "--model_name_or_path", "model", "--max_steps", "2", "--answer_prompts", "1",
        "--answer_tokens", "2", "--bootstrap_resamples", "10", "--retention_file", "texts.txt",
        "--test_fraction", "0.25", "--report_prompts", "1",
    ),
    "eval": (
        "--answer_prompts", "1", "--answer_tokens", "2", "--bootstrap_resamples", "10",
        "--retention_file", "texts.txt",
    ),
    "generate": ("--max_new_tokens", "4"),
    "judge": ("--max_new_tokens", "4"),
}
"""By command: options that make it small, where they aren't given."""
ALWAYS = ("--max_steps",)
"""Of these, those that go before what is given."""

REST = ("--dataset_name", "pairs.jsonl", "--output_dir", "runs/rest")
"""What ``…`` in a command stands for, but for what is given."""

PARSED = {
    "qadapter compare": "trains many models: tests/compare run small ones",
    "qadapter demo": "trains on a real model: tests/test_demo.py, and CI runs it",
    "qadapter serve": "waits for requests: tests/serving ask it",
    "qadapter eval runs/mine --lm_eval": "needs lm-eval: tests/integrations",
    "qadapter eval runs/mine --exemplar_probe": "reads long texts: tests/integrations",
    "qadapter judge runs/mine --dataset_name held_out.jsonl --reward_model": "another model",
    "qadapter judge runs/mine --dataset_name held_out.jsonl --judge_model": "asks an endpoint",
    "qadapter export runs/mine --form gguf --gguf_type": "tests/exporting/test_gguf.py",
    "qadapter export runs/mine --form gguf --output_dir mine-gguf": "docs/gguf.md runs one",
    "qadapter export runs/mine --form ollama": "tests/exporting/test_ollama.py",
    "qadapter export runs/mine --strength": "tests/exporting/test_export.py",
    "qadapter train … --push_to_hub": "sends to a hub: tests/training/test_pushes.py",
    "torchrun": "several processes: tests/training/test_sharded.py and others start such ones",
}
"""Beginning of a command: why it isn't run. What ``qadapter`` is given there is parsed, converted
and checked as it would be."""


def extra_exists(words: Sequence[str], folder: Path) -> None:
    """``pip install 'qadapter[serve]'``, ``pip install '.[serve]'``: an extra of ours."""
    assert words[1] == "install", words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        if found := re.fullmatch(r"(?:qadapter|\.)\[([\w,-]+)\]", word):
            for extra in found[1].split(","):
                assert extra in extras["optional-dependencies"], word


def target_exists(words: Sequence[str], folder: Path) -> None:
    """``make demo``: a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words[1:]:
        if "=" not in word:
            assert re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), word


def script_exists(words: Sequence[str], folder: Path) -> None:
    """``python examples/x.py --option``: a script of the repository that has these options."""
    if words[1] in ("-m", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):  # SGLang, llama.cpp
        return
    source = (ROOT / words[1]).read_text(encoding="utf-8")
    for word in words[2:]:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0]
            assert re.search(rf"\b{name}\b", source), f"{words[1]} has no {word}"


def files_exist(words: Sequence[str], folder: Path) -> None:
    """``ls runs/mine/summary.json``: what a command before it has written."""
    for word in words[1:]:
        assert list(folder.glob(word)), word


def nothing(words: Sequence[str], folder: Path) -> None:
    """A program of others, with options of its own."""


PROGRAMS: dict[str, Callable[[Sequence[str], Path], None]] = {
    "pip": extra_exists,
    "make": target_exists,
    "python": script_exists,
    "ls": files_exist,
    # Those of engines come from qadapter/exporting/engines.py, and make test-engines runs them.
    "transformers": nothing, "vllm": nothing, "llama-server": nothing, "ollama": nothing,
    "printf": nothing, ".": nothing, "python3": nothing,
}
"""Other programs: what is checked in place of running them, of their words and in which folder."""


class _Head:
    weight = torch.randn(50, 8)


def _model(folder: Path) -> Any:
    from qadapter import QAdapterModel

    return QAdapterModel.from_pretrained(folder / "runs/mine")


def _tokenizer(folder: Path) -> Any:
    from qadapter.trunk.loading import load_tokenizer

    return load_tokenizer(folder / "model")


def _pairs(folder: Path) -> Any:
    from qadapter.data import load_preferences

    return load_preferences(folder / "pairs.jsonl")


def _prompts(folder: Path) -> Any:
    return [pair["prompt"] for pair in _pairs(folder).select(range(4))]


STATES = 2, 6
"""Rows and tokens of what a loss is given, of 8 numbers a state and 50 tokens."""
WORDS = ["Yes, blue.", "No.", "Yes, red.", "Maybe, hot."]
GIVEN: dict[str, Callable[[Path], Any]] = {
    "torch": lambda folder: torch,
    "adapter_hidden": lambda folder: torch.randn(*STATES, 8, requires_grad=True),
    "base_hidden": lambda folder: torch.randn(*STATES, 8),
    "lm_head": lambda folder: _Head,
    "input_ids": lambda folder: torch.randint(50, STATES),
    "completion_mask": lambda folder: torch.arange(STATES[1]).expand(STATES) > 2,
    "model": _model,
    "tokenizer": _tokenizer,
    "inputs": lambda folder: _tokenizer(folder)(["What is blue?"] * 2, return_tensors="pt"),
    "pairs": _pairs,
    "pairs_no_policy_saw": _pairs,
    "prompts": _prompts,
    "answers": lambda folder: WORDS,
    "draws": lambda folder: [WORDS],
    "base_draws": lambda folder: [WORDS[::-1]] * 2,
    "polite": _model, "brief": _model,
    # A head on one process, with all of its rows.
    "hidden": lambda folder: torch.randn(6, 8, requires_grad=True),
    "rows": lambda folder: _Head.weight,
    "actions": lambda folder: torch.randint(50, (6,)),
    "b": lambda folder: torch.randn(6),
    "lse": lambda folder: torch.full((6,), 9.0),
    "group": lambda folder: None,
    "start": lambda folder: 0,
}
"""Names that Python on a page uses without making them."""

def _authors_run(folder: Path, name: str) -> None:
    authors_run.save_run(folder / name, save_tiny(folder / "their-base"))


def _trl_lora(folder: Path, name: str) -> None:
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.peft_config["default"].base_model_name_or_path = str(save_tiny(folder / "their-base"))
    model.save_pretrained(folder / name)


MADE: dict[str, Callable[[Path, str], None]] = {
    "logs/qadapter-dsp-academy": _authors_run,
    "dpo-lora": _trl_lora,
}
"""Folders that a page names, made where it does: of their place, called so."""

COMPILED = {
    ("docs/scale.md", "from transformers import AutoModelForCausalLM"):
        "eight processes: tests/training",
    ("docs/reports.md", "from qadapter import"): "sends to a hub: tests/policy/test_hub.py",
    ("docs/server.md", "from openai import OpenAI"): "a server: tests/serving ask it so",
}
"""Page and beginning of Python that is compiled and not run: why."""
