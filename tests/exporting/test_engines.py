"""The table of what serves which export: a command or a reason for every engine and form."""

from __future__ import annotations

import shlex

import pytest

from qadapter.exporting.engines import ENGINES, VLLM_RANKS, Served, vllm_rank, ways

FORMS = ("merged", "lm_head_lora", "peft", "gguf", "ollama")


def way(engine: str, form: str, **facts):
    return {found.engine: found for found in ways(Served(form, "mine", **facts))}[engine]


@pytest.mark.parametrize("form", FORMS)
def test_every_engine_has_a_command_or_a_reason(form):
    found = ways(Served(form, "mine"))
    assert [one.engine for one in found] == list(ENGINES)
    for one in found:
        assert bool(one.commands) != bool(one.reason), one
        assert all(shlex.split(line) for line in one.commands)


def test_a_lora_whose_base_is_tied_is_not_for_llama_cpp():
    assert "refuses it" in way("llama.cpp", "lm_head_lora", tied=True).reason
    assert way("llama.cpp", "lm_head_lora", tied=False).commands
    assert way("vLLM", "lm_head_lora", tied=True).commands


@pytest.mark.parametrize("engine, model_type", [
    ("vLLM", "gemma2"), ("vLLM", "cohere"), ("llama.cpp", "gemma"), ("Ollama", "gemma2"),
    ("SGLang", "gemma"),
])
def test_a_head_that_an_engine_would_leave_out_is_not_served(engine, model_type):
    assert "input embedding" in way(engine, "merged", model_type=model_type).reason
    assert way(engine, "merged", model_type=model_type, tied=True).commands  # a merged LoRA


def test_ranks_that_vllm_takes():
    assert [vllm_rank(rank) for rank in (1, 2, 8, 9, 257, 512, 513)] == [
        1, 8, 8, 16, 320, 512, None
    ]
    assert "above 512" in way("vLLM", "peft", rank=600).reason
    words = shlex.split(way("vLLM", "peft", rank=100).commands[-1])
    assert int(words[words.index("--max-lora-rank") + 1]) in VLLM_RANKS


def test_what_a_head_lora_needs_of_vllm():
    assert "no LoRA on the output layer" in way("vLLM", "lm_head_lora", model_type="mistral").reason
    assert "262,144" in way("vLLM", "lm_head_lora", vocab_size=262_144).reason
    assert way("vLLM", "peft", vocab_size=262_144, model_type="gemma3_text").commands


def test_an_adapter_that_is_more_than_lora():
    for engine in ("vLLM", "SGLang", "llama.cpp", "Ollama"):
        assert "DoRA" in way(engine, "peft", beyond_lora=("DoRA",)).reason


@pytest.mark.parametrize("form", FORMS)
def test_a_shell_reads_names_as_they_are(form):
    folder, base = "-my 'x'; touch $(y)", "some/a b`c`"
    for one in ways(Served(form, folder, base=base)):
        for line in one.commands:
            words = shlex.split(line)
            assert not {"touch", ";", "$(y)", "`c`"} & set(words)
            assert not any(word.startswith("-my") for word in words)


def test_temperature_and_type_are_in_the_commands():
    merged = shlex.split(way("llama.cpp", "merged", temperature=0.7).commands[-1])
    assert merged[merged.index("--temp") + 1] == "0.7"
    assert "0.7" in way("vLLM", "lm_head_lora", temperature=0.7).note
    assert not way("vLLM", "lm_head_lora").note
    for engine in ("vLLM", "SGLang"):
        assert "--dtype float32" in way(engine, "merged", dtype="float32").commands[0]
        assert "--dtype" not in way(engine, "merged").commands[0]
    assert way("llama.cpp", "merged", dtype="float32").commands[0].endswith("--outtype f32")


def test_a_base_of_the_hub_is_fetched_for_converters():
    fetch, convert, *_ = way("llama.cpp", "peft", base="org/name", base_is_folder=False).commands
    assert fetch == "hf download org/name --local-dir name"
    assert shlex.split(convert)[2] == "name"
