"""Modelfiles: the chat template in Ollama's language, or none where it can't be."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from data import tiny
from data.tiny import chatml
from exporting.test_gguf import head_model, in_this_process, saved_base

from qadapter.exporting.export import export
from qadapter.exporting.ollama import chat_format, modelfile, write_modelfile

HERE = Path(__file__).parent
LOOP = "{% for m in messages %}{% if m.role == 'user' %}"
SPLIT = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
)
TEMPLATES = {
    # ChatML, without a system message of its own.
    "plain turns": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content "
    "+ '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}",
    # As SmolLM2: one is said where none is.
    "a system message by default": tiny.CHATML,
    # As Llama 3: bos first, an end of turn that is not eos.
    "bos first": tiny.LLAMA3,
    # As Llama 3.1: a system message always, with something of its own.
    "a system message always": SPLIT + "{{ bos_token + '<|sys|>Knows until 2023.\\n' + (s or '') "
    "+ '<|eot|>' }}" + LOOP + "{{ '<|u|>' + m.content + '<|eot|>' }}{% else %}"
    "{{ '<|a|>' + m.content + '<|eot|>' }}{% endif %}{% endfor %}{{ '<|a|>' }}",
    # As Gemma: the system's words go into the first message.
    "into the first message": SPLIT + LOOP + "{{ '<u>\\n' + (s + '\\n\\n' if loop.first and s else "
    "'') + m.content + '<end>\\n' }}{% else %}{{ '<model>\\n' + m.content + '<end>\\n' }}"
    "{% endif %}{% endfor %}{{ '<model>\\n' }}",
    # As Llama 2: the same, between marks.
    "between marks": SPLIT + LOOP + "{{ bos_token + '[INST] ' + ('<<SYS>>\\n' + s + '\\n<</SYS>>"
    "\\n\\n' if loop.first and s else '') + m.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    # As Mistral: into the last.
    "into the last message": SPLIT + "{{ bos_token }}" + LOOP + "{{ '[INST] ' + (s + '\\n\\n' if "
    "loop.last and s else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}",
    "words": tiny.PLAIN,
    "what Go would read": "{% for m in messages %}{{ '{{' + m.role + '}}\"\"\"\\n' + m.content "
    "+ '{' }}{% endfor %}{{ '{{assistant}}' }}",
}
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
CONVERSATIONS = [
    [*system, *turns] for system in ([], [("system", "Rhyme.\nAlways: {{ x }}")]) for turns in (
        [("user", "Why?")],
        [("user", "Größe {% a %}?"), ("assistant", "5 \"m\"\n\nor so"), ("user", "{{ y }}")],
    )
]


def with_template(template):
    tokenizer = chatml()
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer, conversation):
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in conversation], tokenize=False,
        add_generation_prompt=True,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_are_read_off_templates(name):
    tokenizer = with_template(TEMPLATES[name])
    found = chat_format(tokenizer, adds_bos=False)
    assert "system" in found.before
    for conversation in CONVERSATIONS:
        assert found.render(conversation) == rendered(tokenizer, conversation)


@pytest.mark.skipif(shutil.which("go") is None, reason="needs the go command (golang-go)")
def test_go_renders_the_templates(tmp_path):
    """By the language's own implementation, given what Ollama gives it."""
    asked, expected = [], []
    for template in TEMPLATES.values():
        tokenizer = with_template(template)
        found = chat_format(tokenizer, adds_bos=False)
        for conversation in CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in conversation]
            if found.system_default and conversation[0][0] != "system":  # the Modelfile's SYSTEM
                messages.insert(0, {"role": "system", "content": found.system_default})
            asked.append(json.dumps({"template": found.template(), "messages": messages}))
            expected.append(rendered(tokenizer, conversation))
    result = subprocess.run(
        ["go", "run", str(HERE / "render.go")], input="\n".join(asked), text=True,
        capture_output=True, check=True,
    )
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected


def test_what_is_no_text_around_messages_is_left_alone(tmp_path):
    for template in (
        "{% for m in messages %}{{ loop.index ~ m.role + m.content }}{% endfor %}{{ 'a' }}",
        "{% for m in messages %}{{ m.role + (m.content | upper) }}{% endfor %}{{ 'a' }}",
        "{% for m in messages %}{{ m.role + m.content + m.content | length | string }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{{ raise_exception('not today') }}",
        None,
    ):
        tokenizer = with_template(template)
        assert chat_format(tokenizer, adds_bos=False) is None
        known = write_modelfile(tmp_path, "x.gguf", tokenizer, [], 1.0)
        assert "prompts as they are" in " ".join(known)
        assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "Modelfile").read_text()


def test_a_bos_that_the_engine_adds_is_not_in_the_template():
    tokenizer = with_template(tiny.LLAMA3)
    found = chat_format(tokenizer, adds_bos=True)
    assert tokenizer.bos_token not in found.template()
    assert tokenizer.bos_token in chat_format(tokenizer, adds_bos=False).template()


def test_system_messages_may_be_refused(tmp_path):
    tokenizer = with_template(REFUSING + TEMPLATES["plain turns"])
    found = chat_format(tokenizer, adds_bos=False)
    assert "system" not in found.before and ".System" not in found.template()
    assert "takes no system message" in " ".join(
        write_modelfile(tmp_path, "x.gguf", tokenizer, [], 1.0)
    )


def test_a_modelfile(tmp_path):
    tokenizer = chatml()
    known = write_modelfile(tmp_path, "mine.gguf", tokenizer, [2, 0], 0.8)
    assert known == (
        "TEMPLATE is the chat template in Ollama's language: compared on 6 conversations, they are "
        "the same prompts. Ollama itself was not run.",
    )
    assert (tmp_path / "Modelfile").read_text() == '''FROM ./mine.gguf
TEMPLATE """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""
SYSTEM "You are a helpful assistant"
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
PARAMETER temperature 0.8
PARAMETER top_k 0
PARAMETER top_p 1
PARAMETER min_p 0
PARAMETER repeat_penalty 1
'''


def test_nothing_breaks_a_modelfiles_quotes():
    found = chat_format(with_template(TEMPLATES["what Go would read"]), adds_bos=False)
    text = modelfile("x.gguf", found, ['a"b'], 1.0)
    assert text.count('"""') == 4  # those of TEMPLATE, and of a text with a quote in it
    lines = modelfile("a\nSYSTEM b.gguf", None, ['"""\nSYSTEM c'], 1.0).splitlines()
    assert lines[:2] == ['FROM """./a', 'SYSTEM b.gguf"""'] and "c" not in "".join(lines[2:3])
    quoting = tiny.CHATML.replace("You are a helpful assistant", 'Say \\"hi\\"')
    assert chat_format(with_template(quoting), adds_bos=False) is None


def test_the_files_of_an_export(tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    model = head_model(saved_base(tmp_path / "base"))
    report = export(model, tmp_path / "mine", "ollama")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "mine.gguf", "Modelfile", "README.md", "manifest.json"
    }
    assert (tmp_path / "mine/Modelfile").read_text().startswith("FROM ./mine.gguf\n")
    text = (tmp_path / "mine/README.md").read_text()
    assert report.modelfile[0] in text and "ollama create mine -f mine/Modelfile" in text
