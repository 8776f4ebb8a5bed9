"""Bases without a chat template: one is chosen by name, kept with the adapter, used by everything.

The tiny base has none, as Gemma-3-270M has none; its tokenizer puts a BOS before plain text.
"""

import json

import pytest
import yaml
from data.chat_templates import TOOLS
from data.tiny import LLAMA3, PLAIN, chatml, llama3
from tiny_models import cli, save_tiny, tiny_llama, write_jsonl
from transformers import AutoTokenizer, GenerationConfig

from qadapter import QAdapterConfig, QAdapterError, QAdapterModel, QAdapterTrainer
from qadapter.data import PromptEncoder, learn_end_of_turn, use_chat_template
from qadapter.policy.composition import compose

WORDS = "<|begin|>\n\nHuman: {}\n\nAssistant:"


def transcripts(count=24):
    """HH-RLHF's format; the shorter answer is preferred."""
    asked = "\n\nHuman: Is {} hot?\n\nAssistant:"
    return [
        {"chosen": asked.format(i // 2) + " Yes.",
         "rejected": asked.format(i // 2) + f" I think so, and sometimes {i}."}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base without a template, transcripts, and a run trained on them."""
    folder = tmp_path_factory.mktemp("template")
    model = tiny_llama(vocab_size=600)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "base")
    llama3(template=None).save_pretrained(folder / "base")
    write_jsonl(folder / "pairs.jsonl", transcripts())
    assert cli("train", *flags(folder), "--chat_template", "plain", "--output_dir",
               folder / "run") == 0
    return folder


def flags(folder):
    return (
        "--model_name_or_path", folder / "base", "--dataset_name", folder / "pairs.jsonl",
        "--max_steps", 4, "--adapter_form", "linear", "--adapter_rank", 2, "--answer_prompts", 1,
        "--answer_tokens", 2, "--bootstrap_resamples", 20, "--retention_coef", 0,
        "--eval_strategy", "no",
    )


def told(capsys):
    out = capsys.readouterr()
    return " ".join((out.out + out.err).split())


# --- plain words --------------------------------------------------------------------------------

def test_plain_words_are_the_transcripts():
    tokenizer = llama3(template=None)
    assert "which has none" in use_chat_template(tokenizer, "plain")
    text = tokenizer.apply_chat_template([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hot?"},
        {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"},
    ], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|>Be brief.\n\nHuman: Hot?\n\nAssistant: Yes.<|end|>\n\nHuman: Sure?\n\nAssistant:"
    )
    ids = PromptEncoder(tokenizer)("Hot?")
    assert tokenizer.decode(ids) == WORDS.format("Hot?") and ids.count(tokenizer.bos_token_id) == 1
    assert learn_end_of_turn(tokenizer).token_id == tokenizer.eos_token_id


def test_no_bos_where_the_tokenizer_puts_none():
    tokenizer = chatml()
    tokenizer.chat_template = None
    use_chat_template(tokenizer, "plain")
    assert tokenizer.decode(PromptEncoder(tokenizer)("Hot?")) == "\n\nHuman: Hot?\n\nAssistant:"


def test_a_file_a_folder_and_what_is_in_them(tmp_path):
    (tmp_path / "words.jinja").write_text(PLAIN)
    llama3().save_pretrained(tmp_path / "tokenizer")
    for source, text in (("words.jinja", PLAIN), ("tokenizer", LLAMA3)):
        tokenizer = llama3(template=None)
        assert str(source) in use_chat_template(tokenizer, str(tmp_path / source))
        assert tokenizer.chat_template == text
        assert use_chat_template(tokenizer, str(tmp_path / source)) == ""  # it is its own now
    assert "in place of its own" in use_chat_template(tokenizer, "plain")


@pytest.mark.parametrize(("text", "words"), [
    ("{% for m in messages %}\n{{ m.content }", r"unexpected.*\(line 2\)"),
    ("{{ 'always this' }}", "without the answer"),
    ("{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}", "without the quest"),
    ("{{ raise_exception('never') }}", "cannot render a conversation: never"),
    (" \n", "is empty"),
])
def test_bad_templates_are_named_and_nothing_is_changed(tmp_path, text, words):
    file = tmp_path / "bad.jinja"
    file.write_text(text)
    tokenizer = llama3()
    with pytest.raises(QAdapterError, match=words) as caught:
        use_chat_template(tokenizer, str(file))
    assert str(file) in str(caught.value) and tokenizer.chat_template == LLAMA3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.jinja", "./nowhere", "/nowhere/at/all"])
def test_missing_templates_are_named(source):
    with pytest.raises(QAdapterError, match=f"chat_template {source}: no such file or folder"):
        use_chat_template(llama3(), source)


# --- the command line ---------------------------------------------------------------------------

def test_without_one_both_ways_are_told_before_the_base_is_loaded(place, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    for file in (place / "base").iterdir():  # no weights: they can't be what it fails on
        if file.suffix != ".safetensors":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    given = dict(zip(*[iter(map(str, flags(place)))] * 2, strict=True))
    given["--model_name_or_path"] = str(tmp_path / "base")
    assert cli("train", *[x for flag in given.items() for x in flag], "--output_dir",
               tmp_path / "run") == 2
    text = told(capsys)
    assert "--chat_template plain" in text and "--chat_template FILE" in text
    (tmp_path / "bad.jinja").write_text("{% if %}")
    for command in (("train", *[x for flag in given.items() for x in flag],
                     "--output_dir", tmp_path / "run"),
                    ("generate", tmp_path / "base", "--prompt", "Hot?")):
        assert cli(*command, "--chat_template", tmp_path / "bad.jinja") == 2
        assert "bad.jinja: the chat template cannot render" in told(capsys)


def test_it_is_said_kept_and_used_everywhere(place, capsys):
    run = place / "run"
    kept = (run / "chat_template.jinja").read_text()
    assert "Human" in kept and (run / "checkpoint-4/chat_template.jinja").read_text() == kept
    assert QAdapterModel.from_pretrained(run).chat_template == kept
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"]["train"]["end_of_turn"] == "<|end|>"
    asked = place / "prompts.jsonl"
    write_jsonl(asked, [{"prompt": [{"role": "user", "content": "Hot?"}]}])
    capsys.readouterr()
    for command in (
        ("generate", run, "--prompts_file", asked, "--max_new_tokens", 2),
        ("eval", run, "--dataset_name", place / "pairs.jsonl", "--answer_prompts", 0,
         "--bootstrap_resamples", 20),
        ("judge", run, "--dataset_name", place / "pairs.jsonl", "--judge_fraction", 0.8,
         "--num_prompts", 2, "--draws", 1, "--opponent_draws", 2, "--max_new_tokens", 2),
        ("rewards", run, "--prompt", "Hot?", "--answer", "Yes.", "--output_file",
         place / "rewards.html"),
    ):
        assert cli(*command) == 0, command[0]
        assert f"chat template: that of {run}" in told(capsys), command[0]


def test_rows_of_a_prompts_file_bring_tools_and_keywords(place, tmp_path, capsys):
    asked, template = tmp_path / "prompts.jsonl", tmp_path / "tools.jsonl.jinja"
    template.write_text(TOOLS + "{{ style if style is defined else '' }}")
    rows = [
        {"prompt": "Hot?", "tools": [{"function": {"name": "look"}}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hot?"}]}],
         "chat_template_kwargs": {"style": "brief"}},
        {"prompt": "Hot?"},
    ]
    write_jsonl(asked, rows)
    command = ("generate", place / "run", "--prompts_file", asked, "--max_new_tokens", 2)
    assert cli(*command, "--chat_template", template) == 0
    out = capsys.readouterr()
    lines = [json.loads(line) for line in out.out.splitlines()]
    assert lines[0]["tools"] == rows[0]["tools"] and "leaves something out" not in out.err
    assert cli(*command) == 0  # the words have no place for tools
    assert "leaves something out of 1 of 3 prompts: tools" in told(capsys)
    write_jsonl(asked, [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}])
    assert cli(*command) == 2
    assert "prompts.jsonl:1: a message holds something other than text" in told(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "lm_head_lora"])
def test_exports_carry_it(place, tmp_path, form):
    out = tmp_path / "export"
    assert cli("export", place / "run", "--form", form, "--output_dir", out) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(PromptEncoder(tokenizer)("Hot?")) == WORDS.format("Hot?")
    # The base's own settings did not know what ends a turn.
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert tokenizer.eos_token_id in ([ends] if isinstance(ends, int) else ends)


def test_plain_models_take_one_too(place, capsys):
    asked = place / "prompts.jsonl"
    write_jsonl(asked, [{"prompt": [{"role": "user", "content": "Hot?"}]}])
    command = ("generate", place / "base", "--prompts_file", asked, "--max_new_tokens", 2)
    assert cli(*command) == 2
    assert "--chat_template plain" in told(capsys)
    for flag in ("--chat_template", "--chat_template_path"):
        assert cli(*command, flag, "plain") == 0
        assert "plain (roles as words)" in told(capsys)


def test_yaml_takes_both_names_and_not_twice(place, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    for names, code in ((["chat_template"], 0), (["chat_template_path"], 0),
                        (["chat_template", "chat_template_path"], 2)):
        config.write_text(yaml.safe_dump({"max_new_tokens": 2} | dict.fromkeys(names, "plain")))
        assert cli("generate", place / "base", "--prompt", "Hot?", "--config", config) == code
        text = told(capsys)
        assert ("roles as words" if code == 0 else "are one option") in text


def test_training_goes_on_with_it(place, tmp_path, capsys):
    import shutil

    shutil.copytree(place / "run", tmp_path / "run")
    given = [6 if x == 4 else x for x in flags(place)]
    assert cli("train", *given, "--output_dir", tmp_path / "run", "--resume_from_checkpoint",
               "true") == 0
    assert "chat template: that of" in told(capsys)


# --- in Python ----------------------------------------------------------------------------------

def test_the_trainer_takes_it_as_trl_does_and_the_adapter_has_it(place, tmp_path):
    lines = []
    trainer = QAdapterTrainer(
        str(place / "base"), QAdapterConfig(
            output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], disable_tqdm=True,
            chat_template_path="plain", adapter_form="linear", adapter_rank=2, retention_coef=0.0,
        ), train_dataset=transcripts(), say=lines.append,
    )
    assert any("plain (roles as words)" in line for line in lines)
    trainer.train()
    model = QAdapterModel.from_pretrained(tmp_path / "run", is_trainable=True)
    assert model.chat_template == trainer.processing_class.chat_template
    # Trained further: its own template again.
    again = QAdapterTrainer(model, QAdapterConfig(
        output_dir=str(tmp_path / "again"), max_steps=1, report_to=[], disable_tqdm=True,
        retention_coef=0.0,
    ), train_dataset=transcripts())
    assert again.processing_class.chat_template == model.chat_template
    other = QAdapterModel.from_pretrained(tmp_path / "run", model.base)
    assert compose([model, other], [0.5, 0.5]).chat_template == model.chat_template
    other.chat_template = LLAMA3
    with pytest.raises(QAdapterError, match="different chat templates"):
        compose([model, other], [0.5, 0.5])


def test_a_template_of_its_own_is_not_spoken_of(tmp_path, capsys):
    save_tiny(tmp_path / "base")
    assert cli("generate", tmp_path / "base", "--prompt", "Hot?", "--max_new_tokens", 2) == 0
    assert "chat template" not in told(capsys)
