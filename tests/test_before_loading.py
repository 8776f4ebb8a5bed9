"""What can fail without a base's weights fails before they are loaded: the base here has none."""

import json
import shutil

import pytest
import yaml
from tiny_models import cli, preference_rows, save_tiny, write_jsonl

from qadapter.trunk.loading import base_without_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    save_tiny(folder / "whole")
    save_tiny(folder / "bare")
    for file in (folder / "bare").glob("*.safetensors"):
        file.unlink()
    write_jsonl(folder / "pairs.jsonl", preference_rows(12))
    return folder


@pytest.fixture
def train(place, tmp_path, capfd):
    """(exit code, last line of stderr) of a short training."""

    def run(*flags, base="bare"):
        code = cli(
            "train", "--model_name_or_path", place / base, "--dataset_name", place / "pairs.jsonl",
            "--output_dir", tmp_path / "run", "--max_steps", 1,
            "--answer_prompts", 0, "--bootstrap_resamples", 5, "--test_fraction", 0.3,
            *flags,
        )
        return code, capfd.readouterr().err.strip().splitlines()[-1:]

    return run


def test_a_base_without_weights_fails_last(train):
    code, [line] = train()
    assert code == 2 and "can't be loaded" in line


@pytest.mark.parametrize("flags, named", [
    (["--max_length", 3], "no preference pair can be used"),
    (["--optim", "lomo"], "optim"),
    (["--bf16_full_eval", "true"], "bf16_full_eval"),
    (["--metric_for_best_model", "accuracy"], "metric_for_best_model"),
    (["--load_best_model_at_end", "true", "--test_fraction", 0], "load_best_model_at_end"),
    (["--load_best_model_at_end", "true", "--eval_steps", 7, "--save_steps", 7], "eval_steps 7"),
    (["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", "{nothing: 1}"], "nothing"),
    (["--model_init_kwargs", "{dtype: bfloat16}", "--dtype", "float32"], "dtype"),
    (["--model_init_kwargs", "{revision: a}", "--model_revision", "b"], "revision"),
    (["--model_init_kwargs", "eager"], "model_init_kwargs"),
])
def test_what_needs_no_weights_is_named_first(train, flags, named):
    code, [line] = train(*flags)
    assert code == 2 and named in line and "can't be loaded" not in line


def test_a_layer_that_is_not_there(place, tmp_path, capfd):
    code = cli(
        "train", "--model_name_or_path", place / "bare", "--dataset_name", place / "pairs.jsonl",
        "--output_dir", tmp_path / "run", "--adapter_kind", "lora", "--lora_target_modules",
        "[no_proj]",
    )
    assert code == 2 and "no_proj" in capfd.readouterr().err


@pytest.mark.parametrize("modules", ["all-linear", "[q_proj, v_proj]"])
def test_a_lora_in_upper_blocks(train, modules):
    """Which there are is told from the base without its weights, and again when they are there."""
    flags = ("--adapter_kind", "lora", "--lora_target_modules", modules, "--lora_layers")
    code, [line] = train(*flags, "1")
    assert code == 2 and "can't be loaded" in line
    code, [line] = train(*flags, "99")
    assert code == 2 and "lora_layers=99" in line
    assert train(*flags, "top:1", base="whole")[0] == 0


def test_a_token_that_the_base_does_not_know(place, train, tmp_path):
    rows = [{"prompt_ids": [5, 6 + i], "chosen_ids": [6 + i], "rejected_ids": [100_000]}
            for i in range(8)]
    code, [line] = train("--dataset_name", write_jsonl(tmp_path / "ids.jsonl", rows))
    assert code == 2 and "100000" in line


def test_no_chat_template(place, train, tmp_path):
    base = tmp_path / "plain"
    shutil.copytree(place / "bare", base)
    for file in base.glob("*.jinja"):
        file.unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    code, [line] = train(base=base)
    assert code == 2 and "chat" in line and "template" in line


@pytest.mark.slow
def test_loading_options_from_flags_and_files(train, tmp_path):
    """As YAML in a flag, as a mapping in a file, and a flag that takes true and false."""
    code, line = train(
        "--model_init_kwargs", "{attn_implementation: eager, device_map: cpu}", "--bf16", "true",
        "--save_only_model=false", base="whole",
    )
    assert code == 0, line
    saved = json.loads((tmp_path / "run/training_args.json").read_text())
    assert saved["model_init_kwargs"]["attn_implementation"] == "eager" and saved["bf16"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "model_init_kwargs": {"attn_implementation": "eager", "dtype": "bfloat16"}, "bf16": False,
        "overwrite_output_dir": True,
    }))
    code, line = train("--config", tmp_path / "run.yaml", base="whole")
    assert code == 0, line
    assert json.loads((tmp_path / "run/summary.json").read_text())["dtype"] == "bfloat16"


def test_the_shell_of_a_base_has_no_weights(place):
    shell = base_without_weights(place / "bare")
    assert {p.device.type for p in shell.parameters()} == {"meta"}
