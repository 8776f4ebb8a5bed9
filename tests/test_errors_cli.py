"""Bad input ends in one clear line and exit code 2; what was written stays."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from another_run import another_run
from compare.comparisons import write_config, write_place
from tiny_models import preference_rows, save_tiny, write_jsonl

from qadapter import QAdapterError
from qadapter.cli import main
from qadapter.console import folders
from qadapter.system import room
from qadapter.training import QAdapterConfig, QAdapterTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    save_tiny(folder / "model")
    save_tiny(folder / "other", seed=1)
    write_jsonl(folder / "pairs.jsonl", preference_rows(12))
    with pytest.raises(SystemExit) as end:
        main([*train(folder), "--output_dir", str(folder / "run")])
    assert end.value.code == 0
    return folder


def train(folder, *more):
    """Arguments of a short training; the last of two equal flags counts."""
    return [str(a) for a in (
        "train", "--model_name_or_path", folder / "model", "--dataset_name",
        folder / "pairs.jsonl", "--max_steps", 2, "--adapter_rank", 2, "--answer_prompts", 0,
        "--bootstrap_resamples", 5, "--test_fraction", 0.3, *more,
    )]


@pytest.fixture
def fails(capfd):
    """Runs a command that must fail; returns its one line."""

    def run(*arguments, code=2) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        assert end.value.code == code
        error = capfd.readouterr().err
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and error.endswith(lines[0] + "\n")
        return lines[0]

    return run


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- data ---------------------------------------------------------------------------------------


def test_file_missing(place, tmp_path, fails):
    line = fails(*train(place, "--dataset_name", tmp_path / "no.jsonl", "--output_dir", tmp_path))
    assert "no.jsonl" in line


def test_not_json_names_the_line(place, tmp_path, fails):
    file = write_jsonl(tmp_path / "bad.jsonl", preference_rows(2))
    file.write_text(file.read_text() + '{"prompt": "What", \n')
    line = fails(*train(place, "--dataset_name", file, "--output_dir", tmp_path / "run"))
    assert "bad.jsonl:3 is not JSON" in line


def test_missing_column_says_what_was_seen_and_what_is_needed(place, tmp_path, fails):
    file = write_jsonl(tmp_path / "bad.jsonl", [{"question": "What?", "good": "a", "bad": "b"}])
    line = fails(*train(place, "--dataset_name", file, "--output_dir", tmp_path / "run"))
    assert "question, good, bad" in line and "chosen + rejected" in line


def one_row(**changes):
    return [preference_rows(1)[0] | changes]


@pytest.mark.parametrize("rows, reason", [
    (one_row(chosen=[{"role": "assistant", "content": ""}]), "an answer is empty"),
    (one_row(rejected=preference_rows(1)[0]["chosen"]), "the two answers are the same"),
    ([{"chosen": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}],
       "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "b"}]}],
     "do not share one prompt"),
])
def test_nothing_left_says_why_with_the_rows(place, tmp_path, fails, rows, reason):
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    flags = ("--dataset_name", file, "--test_fraction", 0, "--output_dir", tmp_path / "run")
    line = fails(*train(place, *flags))
    assert "no preference pair can be used" in line and reason in line and "row 0" in line


def test_the_first_bad_row_raises_where_asked(place, tmp_path, fails):
    rows = preference_rows(12)
    rows[7]["rejected"] = rows[7]["chosen"]
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    flags = ("--dataset_name", file, "--on_bad_row", "raise", "--output_dir", tmp_path / "run")
    assert "row 7" in fails(*train(place, *flags))


@pytest.mark.parametrize("name, text, message", [
    ("t.csv", "a", "expected a .txt or .jsonl file"), ("t.txt", "\n", "is empty"),
    ("t.jsonl", '{"text": "a"}\nno', "t.jsonl:2 is not JSON"),
    ("t.jsonl", '{"body": "a"}', "t.jsonl:1 has no 'text', only body"),
    ("t.jsonl", '{"text": "a\u2028b"}\n{"text": 3}', "t.jsonl:2: 'text' must be text"),
    (None, None, "can't be read"),
])
def test_bad_retention_file(place, tmp_path, fails, name, text, message):
    if name:
        (tmp_path / name).write_text(text)
    line = fails("eval", "--model_name_or_path", place / "model", "--dataset_name",
                 place / "pairs.jsonl", "--retention_file", tmp_path / (name or "no.txt"))
    assert message in line


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, parts", [
    (["--lerning_rate", "1"], ["--lerning_rate", "--learning_rate"]),
    (["--learning_rate", "fast"], ["--learning_rate", "a number", "'fast'"]),
    (["--max_steps", "1.5"], ["--max_steps", "a whole number"]),
    (["--adapter_form", "liner"],
     ["--adapter_form", "linear, block, mlp", "did you mean 'linear'"]),
    (["--adapter_kind", "lora"], ["adapter_rank is for adapter_kind head, and this is lora"]),
    (["--lora_r", "0"], ["lora_r must be at least 1"]),
    (["--lora_r", "4"], ["lora_r is for adapter_kind lora, and this is head"]),
    (["--alpha_tilde", "0"], ["alpha_tilde must be positive"]),
    (["--torch_compile"], ["torch_compile=True can't be honoured"]),
    (["--eval_strategy", "sometimes"], ["sometimes"]),
    (["--columns", "chosen"], ["columns must read"]),
    (["--test_fraction", "1"], ["test_fraction must be from 0 to below 1, got 1.0"]),
    (["--test_fraction", "nan"], ["test_fraction must be from 0 to below 1"]),
    (["--max_rows", "0"], ["max_rows (limit) must be at least 1, got 0"]),
    (["--max_length", "1"], ["max_length must be at least 2, got 1"]),
    (["--seed", "-1"], ["seed must be at least 0, got -1"]),
    (["--report_to", "foo"], ["report_to: 'foo' is none of", "wandb"]),
    (["--resume_from_checkpoint", "nowhere"], ["nowhere: not a checkpoint"]),
    (["--resume_from_checkpoint", "true"], ["no checkpoint to resume from"]),
    # What is measured behind the training is looked at before it.
    (["--measure_batch_size", "0"], ["measure_batch_size must be at least 1, got 0"]),
    (["--bootstrap_resamples", "0"], ["bootstrap_resamples must be at least 1"]),
    (["--answer_prompts", "-1"], ["answer_prompts must be at least 0"]),
    (["--measure_seed", "-1"], ["measure_seed must be at least 0, got -1"]),
    (["--retention_file", "nowhere.txt"], ["nowhere.txt can't be read"]),
])
def test_bad_options(place, tmp_path, fails, arguments, parts):
    line = fails(*train(place, *arguments, "--output_dir", tmp_path / "run"))
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_commands_of_one_process_take_no_base_of_several(place, tmp_path, fails):
    spread = ("--model_init_kwargs", "{distributed_config: {tp_size: 2}}")
    for command in (
        ("eval", place / "run", "--dataset_name", place / "pairs.jsonl", "--output_dir", tmp_path),
        ("generate", place / "run", "--prompt", "x"),
        ("export", place / "run", "--output_dir", tmp_path / "out"),
    ):
        line = fails(*command, *spread)
        assert "distributed_config is for qadapter train" in line and "device_map: auto" in line
    line = fails(
        "train", "--model_name_or_path", place / "model", "--dataset_name", place / "pairs.jsonl",
        "--output_dir", tmp_path / "lora", *spread,
    )
    assert "tensor parallelism" in line and "adapter_kind head" in line and "fsdp_size" in line


def test_options_are_looked_at_before_the_model(place, tmp_path, fails):
    nowhere = ("--model_name_or_path", tmp_path / "nowhere")
    assert "not a checkpoint" in fails(*train(
        place, *nowhere, "--resume_from_checkpoint", tmp_path, "--output_dir", tmp_path / "run"
    ))
    data = ("--dataset_name", place / "pairs.jsonl")
    for option, value, message in (
        ("--strength", "nan", "strength must be finite and not negative, got nan"),
        ("--max_length", 1, "max_length must be at least 2, got 1"),
        ("--measure_seed", -1, "measure_seed must be at least 0, got -1"),
        ("--max_rows", 0, "max_rows (limit) must be at least 1, got 0"),
    ):
        assert message in fails("eval", *nowhere, *data, option, value)


@pytest.mark.parametrize("option", ["--retention_file", "--retention_dataset_name"])
def test_texts_without_a_token_to_score_are_named_before_training(place, tmp_path, fails, option):
    file = tmp_path / "short.txt"
    file.write_text("a\n")
    line = fails(*train(place, option, file, "--output_dir", tmp_path / "run"))
    assert f"{option[2:]} {file}: no text has two tokens" in line
    assert not list((tmp_path / "run").iterdir())
    if option == "--retention_file":
        assert str(file) in fails("eval", "--model_name_or_path", place / "model", "--dataset_name",
                                  place / "pairs.jsonl", option, file)


@pytest.mark.parametrize("text, message", [
    ("lerning_rate: 1", "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    ("seed: one", "seed: expected a whole number, got 'one'"),
    ("seed: [1]", "seed: expected a whole number, got [1]"),
    ("seed: 1\nseed: 2", "bad.yaml:2 is not YAML: the key 'seed' stands there twice"),
    ("a: b: c", "bad.yaml:1 is not YAML"), ("- seed", "holds a list"),
    ("seed: " + "9" * 30, "seed: expected a whole number, got 999"),
    ("learning_rate: [" + "[a]," * 5000 + "]", "expected a number or none, got [['a'], ['a'],"),
    # transformers would open the file of that number.
    ("accelerator_config: true", "expected text or keys and values or none, got True"),
    ("lr_scheduler_kwargs: 1", "expected text or keys and values or none, got 1"),
    ("? " + "x" * 5000 + "\n: 1", "unknown key 'xxx"), ("lr_scheduler_type: [a]", "expected text"),
])
def test_bad_config_files(place, tmp_path, fails, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in fails("train", "--config", tmp_path / "bad.yaml")


def test_unknown_commands_and_what_a_command_cannot_do_without(place, tmp_path, fails):
    assert "No such command 'trian'" in fails("trian")
    assert "train needs --dataset_name" in fails("train")
    assert "train needs --output_dir" in fails("train", "--dataset_name", "x")
    assert "eval needs --model_name_or_path" in fails("eval", "--dataset_name", "x")
    model = ("--model_name_or_path", place / "model")
    assert "not both" in fails("generate", *model, "--prompt", "a", "--prompts_file", "b")
    assert "--do_sample" in fails("generate", *model, "--prompt", "a", "--temperature", 2)
    assert "top_p" in fails("generate", *model, "--prompt", "a", "--do_sample", "--top_p", 2)
    assert "strength" in fails("generate", *model, "--prompt", "a", "--strength", 0.5)
    assert "prompt is empty" in fails("generate", *model, "--prompt", " ")
    (tmp_path / "out.jsonl").write_text("mine")
    (tmp_path / "in.txt").write_text("a\n")
    assert "exists" in fails("generate", *model, "--prompts_file", tmp_path / "in.txt",
                             "--output_file", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"


# --- models and adapters ------------------------------------------------------------------------


def test_unknown_model(place, tmp_path, fails):
    wanted = tmp_path / "nowhere"
    flags = ("--model_name_or_path", wanted, "--output_dir", tmp_path / "run")
    assert f"{wanted}: no such folder" in fails(*train(place, *flags))
    assert "nowhere" in fails("generate", "--model_name_or_path", wanted, "--prompt", "a")


def test_adapter_and_base_that_do_not_match_are_both_named(place, fails):
    line = fails("eval", "--model_name_or_path", place / "run", "--base_model_name_or_path",
                 place / "other", "--dataset_name", place / "pairs.jsonl")
    assert f"trained on {place / 'model'}" in line and f"is {place / 'other'}" in line


@pytest.mark.parametrize("damage, message", [
    (lambda f: f.write_bytes(f.read_bytes()[:-50]), "adapter_model.safetensors is not what was"),
    (lambda f: f.unlink(), "adapter_model.safetensors is missing"),
    (lambda f: (f.parent / "qadapter_config.json").write_text("{"), "config.json is not what was"),
    (lambda f: (f.parent / "qadapter_config.json").unlink(), "qadapter_config.json is missing"),
    (lambda f: (f.parent / "manifest.json").unlink(), "manifest.json is missing"),
])
def test_damaged_adapters(place, tmp_path, fails, damage, message):
    shutil.copytree(place / "run", tmp_path / "run")
    damage(tmp_path / "run/adapter_model.safetensors")
    line = fails("generate", "--model_name_or_path", tmp_path / "run", "--prompt", "a")
    assert message in line and str(tmp_path) in line


def test_damaged_base(place, tmp_path, fails):
    shutil.copytree(place / "model", tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = fails(*train(place, "--model_name_or_path", tmp_path / "model", "--output_dir",
                        tmp_path / "run"))
    assert str(tmp_path / "model") in line and "can't be loaded" in line


def truncate(file):
    file.write_bytes(file.read_bytes()[:-50])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize("name, damage", [
    ("optimizer.pt", truncate), ("optimizer.pt", flip), ("scheduler.pt", truncate),
    ("rng_state.pth", truncate), ("trainer_state.json", truncate), ("training_args.json", flip),
    ("adapter_model.safetensors", flip), ("optimizer.pt", Path.unlink),
    ("rng_state.pth", Path.unlink), ("manifest.json", truncate), ("resuming.json", Path.unlink),
])
def test_damaged_checkpoints(place, tmp_path, fails, name, damage):
    shutil.copytree(place / "run", tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoint-2"
    damage(checkpoint / name)
    before = contents(tmp_path / "run")
    for wanted in ("true", checkpoint):
        line = fails(*train(place, "--max_steps", 3, "--resume_from_checkpoint", wanted,
                            "--output_dir", tmp_path / "run"))
        assert f"{checkpoint / name}" in line
        assert wanted != "true" or "start again without" in line
    assert contents(tmp_path / "run") == before


# --- folders, disks, interrupts -------------------------------------------------------------------


def test_a_folder_that_holds_another_run_is_left_alone(place, tmp_path, fails):
    before = contents(place / "run")
    line = fails(*train(place, "--output_dir", place / "run"))
    assert "holds another run" in line and "--overwrite_output_dir" in line
    assert contents(place / "run") == before
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(*train(place, "--output_dir", tmp_path / "file"))
    (tmp_path / "eval.json").write_text("{}")
    assert "holds another run (eval.json)" in fails(
        "eval", "--model_name_or_path", place / "run", "--dataset_name", place / "pairs.jsonl",
        "--output_dir", tmp_path,
    )


@pytest.mark.parametrize("command", ["train", "eval", "judge", "demo", "compare", "export"])
def test_a_folder_that_another_run_is_writing_is_left_alone(place, tmp_path, fails, command):
    folder, data = tmp_path / "out", ("--dataset_name", place / "pairs.jsonl")
    arguments = {
        "train": train(place, "--overwrite_output_dir"), "demo": ["demo"],
        "eval": ["eval", place / "model", *data, "--overwrite_output_dir"],
        "judge": ["judge", place / "run", *data, "--judge_fraction", 0.5],
        "export": ["export", place / "run", "--form", "merged"],
        "compare": ["compare", write_config(write_place(tmp_path / "compare"))],
    }[command]
    with another_run(folder, beside=command == "export"):
        before = contents(tmp_path)
        line = fails(*arguments, "--output_dir", folder)
        assert f"{folder} is being written by another run (process 123 on elsewhere," in line
        assert contents(tmp_path) == before
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("command", ["train", "eval", "export", "demo"])
def test_a_folder_that_links_to_itself(place, tmp_path, fails, command):
    (tmp_path / "loop").symlink_to("loop")
    data = ("--dataset_name", place / "pairs.jsonl")
    arguments = {
        "train": train(place), "eval": ["eval", place / "model", *data],
        "export": ["export", place / "run"], "demo": ["demo"],
    }[command]
    line = fails(*arguments, "--output_dir", tmp_path / "loop")
    assert f"output_dir {tmp_path / 'loop'} is a file, or a link to none" in line


def test_what_is_left_of_a_killed_export_goes_though_the_next_is_refused(place, tmp_path, fails):
    left = tmp_path / ".qadapter-exporting-abcd1234"
    for folder in (left, tmp_path / "out"):
        folder.mkdir()
    for file in (left / ".owner.lock", left / "base", tmp_path / ".out.lock", tmp_path / "out/x"):
        file.write_text("{}")
    assert "is not empty" in fails("export", place / "run", "--output_dir", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_trainings_of_one_folder_from_python(place, tmp_path, fails):
    """The trainer itself holds the folder, not the command alone."""
    trainer = QAdapterTrainer(
        str(place / "model"), QAdapterConfig(
            output_dir=str(tmp_path), max_steps=1, report_to="none", disable_tqdm=True,
            retention_coef=0.0, adapter_rank=2,
        ), train_dataset=preference_rows(4),
    )
    with another_run(tmp_path), pytest.raises(QAdapterError, match="process 123 on elsewhere"):
        trainer.train()
    trainer.train()
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("flags", [(), ("--overwrite_output_dir",)])
def test_inputs_outlive_a_run_into_their_folder(place, tmp_path, fails, flags):
    shutil.copytree(place / "model", tmp_path / "base")
    (tmp_path / "proj").mkdir()
    rows = [row | {"text": "Yes, no."} for row in preference_rows(12)]
    pairs = write_jsonl(tmp_path / "proj/pairs.jsonl", rows)
    metrics = write_jsonl(tmp_path / "proj/metrics.jsonl", rows)
    (tmp_path / "proj/eval.json").write_text("{}")  # even where an evaluation seems to be
    before = contents(tmp_path)
    line = fails("eval", tmp_path / "base", "--dataset_name", pairs, "--output_dir",
                 tmp_path / "proj", *flags)
    assert f"dataset_name {pairs} would be written over" in line
    line = fails("eval", tmp_path / "base", "--dataset_name", place / "pairs.jsonl",
                 "--retention_file", pairs, "--output_dir", tmp_path / "proj", *flags)
    assert f"retention_file {pairs} would be written over" in line
    for option, name, folder in (
        ("model_name_or_path", tmp_path / "base", tmp_path / "base"),
        ("dataset_name", tmp_path / "proj", tmp_path / "proj"),
        ("test_dataset_name", metrics, tmp_path / "proj"),
    ):
        line = fails(*train(place, f"--{option}", name, "--output_dir", folder, *flags))
        assert f"{option} {name} would be written over" in line
    assert contents(tmp_path) == before


def test_a_readme_of_ones_own_is_not_written_over(place, tmp_path, fails):
    (tmp_path / "README.md").write_text("mine")
    assert "(README.md): choose another" in fails(*train(place, "--output_dir", tmp_path))
    assert contents(tmp_path) == {Path("README.md"): b"mine"}


@pytest.mark.parametrize("name", ["pairs.jsonl", "report.md"])
def test_only_an_evaluation_is_replaced_by_one(place, tmp_path, fails, name):
    (tmp_path / name).write_text("mine")
    line = fails("eval", place / "model", "--dataset_name", place / "pairs.jsonl", "--output_dir",
                 tmp_path, "--overwrite_output_dir")
    assert f"holds a {name} of something else (eval.json is not beside it)" in line
    assert contents(tmp_path) == {Path(name): b"mine"}


def test_a_folder_that_cannot_be_written_to_is_seen_first(place, tmp_path, fails, monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(room.tempfile, "TemporaryFile", refuse)
    line = fails("eval", tmp_path / "nowhere", "--dataset_name", place / "pairs.jsonl",
                 "--output_dir", tmp_path)
    assert f"output_dir {tmp_path} can't be written to: Permission denied" in line


def test_overwriting_waits_until_the_new_run_can_start(place, tmp_path, fails):
    shutil.copytree(place / "run", tmp_path / "run")
    before = contents(tmp_path / "run")
    fails(*train(place, "--output_dir", tmp_path / "run", "--overwrite_output_dir",
                 "--model_name_or_path", tmp_path / "nowhere"))
    assert contents(tmp_path / "run") == before


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_space_for_a_checkpoint_keeps_the_earlier_ones(place, tmp_path, fails, monkeypatch):
    from qadapter.policy import storage

    saved, save_file = [], storage.save_file

    def save_once(weights, path, metadata=None):
        saved.append(path)
        return no_space() if len(saved) > 1 else save_file(weights, path, metadata=metadata)

    monkeypatch.setattr(storage, "save_file", save_once)
    line = fails(*train(place, "--save_steps", 1, "--output_dir", tmp_path))
    assert "No space left on device" in line and "checkpoint-2" in line and "free there" in line
    assert "go on later from the last one with resume_from_checkpoint true" in line
    assert (tmp_path / "checkpoint-1/adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2").exists()
    # What was logged until then is there.
    assert (tmp_path / "metrics.jsonl").is_file()


def test_no_space_for_the_summary_keeps_the_adapter(place, tmp_path, fails, monkeypatch):
    # The adapter's own files are replaced into place by the same call: only the report's fails.
    replace, ours = os.replace, ("metrics.jsonl", "summary.json", "report.md")
    monkeypatch.setattr(
        os, "replace", lambda *x: (no_space if Path(x[1]).name in ours else replace)(*x)
    )
    line = fails(*train(place, "--output_dir", tmp_path))
    assert line == (
        f"error: {tmp_path}: no space left on the device: free some; the adapter is there: "
        f"qadapter eval {tmp_path}"
    )
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "summary.json").exists()
    assert not list(tmp_path.glob(".qadapter-*"))


def test_no_space_for_the_tokenizer_which_rust_tells_as_text(place, tmp_path, fails, monkeypatch):
    def fail(self, *args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(QAdapterTrainer, "save_model", fail)
    line = fails(*train(place, "--output_dir", tmp_path))
    assert f"{tmp_path / 'checkpoint-2'}: the checkpoint can't be saved: No space left" in line
    assert "start again later" in line
    line = fails(*train(place, "--output_dir", tmp_path / "no", "--save_strategy", "no"))
    assert f"{tmp_path / 'no'}: no space left" in line and "start again later" in line


@pytest.mark.parametrize("named", [True, False])
def test_the_disk_that_is_full_is_named(place, tmp_path, fails, monkeypatch, named):
    """Not the output folder's, where it is a cache's."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    error = OSError(errno.ENOSPC, "No space left on device", *(
        [str(cache / "huggingface/datasets/tokens.arrow")] if named else []
    ))

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("qadapter.commands.train.tokenize_preferences", full)
    monkeypatch.setattr(folders, "free_disk", lambda place: 10 if cache in Path(place).parents
                        else 10**9)
    line = fails(*train(place, "--output_dir", out))
    full_place = cache / ("huggingface/datasets" if named else "qadapter")
    assert line.startswith(f"error: {full_place}: no space left on the device: free some; there is")
    assert "start again later" in line


@pytest.mark.parametrize("command, told", [
    ("eval", "run it again"), ("judge", "answers and judgements so far are kept"),
    ("export", "export again"), ("compare", "what is finished is kept"),
])
def test_how_to_go_on_after_a_full_disk(place, tmp_path, fails, monkeypatch, command, told):
    data = ("--dataset_name", place / "pairs.jsonl", "--output_dir", tmp_path / "out")
    arguments, patched = {
        "eval": (["eval", place / "model", *data], "commands.evaluate.write_json"),
        "judge": (["judge", place / "run", *data, "--judge_model", "m", "--judge_url",
                   "http://localhost:1"], "commands.judge.write_json"),
        "export": (["export", place / "run", *data[2:]], "commands.export.export"),
        "compare": (["compare", tmp_path / "compare.yaml", *data[2:]],
                    "commands.compare.run_comparison"),
    }[command]
    if command == "compare":
        write_config(write_place(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setattr(f"qadapter.{patched}", no_space)
    line = fails(*arguments)
    assert f"{tmp_path / 'out'}: no space left on the device: free some; " in line and told in line


def test_interrupted(place, tmp_path, fails, monkeypatch):
    def interrupt(self, *args, **kwargs):
        self.state.log_history.append({"step": 1, "loss": 0.7})
        raise KeyboardInterrupt

    monkeypatch.setattr(QAdapterTrainer, "train", interrupt)
    line = fails(*train(place, "--output_dir", tmp_path), code=130)
    assert line == "error: interrupted"
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.7}


def test_nothing_is_left_where_nothing_was_logged(place, tmp_path, fails, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(QAdapterTrainer, "train", interrupt)
    fails(*train(place, "--output_dir", tmp_path), code=130)
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback_before_the_line(place, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        main(["--debug", *train(place, "--output_dir", place / "run")])
    error = capfd.readouterr().err
    assert end.value.code == 2
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: output_dir")
