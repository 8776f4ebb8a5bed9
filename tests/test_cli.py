"""The command line, in this process, on a tiny model: what each command does and writes."""

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny_models import cli, preference_rows, save_tiny, write_jsonl

from qadapter import QAdapterModel
from qadapter.commands import measuring
from qadapter.evaluation import evaluate_preferences
from qadapter_kernels import dispatch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, preferences, texts, and a run trained on them."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(40))
    (folder / "texts.txt").write_text("The sky is blue.\n\nYes, no, maybe, never.\n")
    # Held to the base's answers, so few steps would leave greedy answers as they were.
    flags = (*train_flags(folder), "--retention_coef", 0)
    assert cli("train", *flags, "--output_dir", folder / "run") == 0
    return folder


def train_flags(folder, steps=12):
    return (
        "--model_name_or_path", folder / "model", "--dataset_name", folder / "pairs.jsonl",
        "--max_steps", steps, "--learning_rate", "1e-2", "--adapter_rank", 4, "--answer_prompts", 3,
        "--answer_tokens", 4, "--bootstrap_resamples", 50, "--test_fraction", 0.25, "--save_steps",
        4, "--logging_steps", 2, "--retention_file", folder / "texts.txt",
    )


def squeezed(text: str) -> str:
    """Rich draws boxes and breaks lines; the words are what counts."""
    return " ".join("".join(c if c not in "│┃╭╮╰╯─━" else " " for c in text).split())


# --- help ---------------------------------------------------------------------------------------


def test_help_needs_no_heavy_import():
    code = (
        "import sys\nfrom qadapter.cli import main\ntry:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("demo", "train", "eval", "generate", "serve", "info"):
        assert name in done.stdout


def test_help_shows_our_options_with_defaults_and_the_rest_on_demand(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli("train", "--help") == 0
    text = squeezed(capsys.readouterr().out)
    for part in ("--chi2_coef NUMBER Weight of the mean squared reward", "[default: 0.1]",
                 "linear|block|mlp", "--test_fraction", "--learning_rate", "--help_all"):
        assert part in text
    assert "--adam_beta1" not in text and "((" not in text
    assert cli("train", "--help_all") == 0
    text = squeezed(capsys.readouterr().out)
    assert "--adam_beta1" in text and "--chi2_coef" in text
    assert "--do_train" not in text
    for command in ("demo", "eval", "generate", "info"):
        assert cli(command, "--help") == 0
    assert cli() == 0 and cli("--version") == 0


def test_info_says_which_kernels_and_why(capsys):
    assert cli("info") == 0
    text = capsys.readouterr().out
    for part in ("torch", "transformers", "devices", "kernels", "taken for", "base models",
                 "compiled libraries"):
        assert part in text
    for operator in dispatch.OPERATORS:
        assert operator in text


# --- train --------------------------------------------------------------------------------------


def test_train_writes_adapter_numbers_pictures_and_report(place, capsys):
    run = place / "run"
    summary = json.loads((run / "summary.json").read_text())
    for key in ("preference_accuracy", "preference_accuracy_base", "kl_per_token", "perplexity",
                "perplexity_base", "seconds", "peak_rss_bytes"):
        assert isinstance(summary[key], float | int), key
    assert summary["retention_texts"] == "texts.txt"
    assert set(summary["retention"]) == {"texts.txt", "the base's own answers"}
    assert summary["data"]["train"]["kept"] + summary["data"]["eval"]["kept"] == 40
    assert summary["data"]["eval"]["kept"] == summary["num_pairs"] == 10
    assert summary["num_prompts"] == 5
    # The chosen answers differ from the rejected in their words: a few steps tell them apart.
    assert summary["preference_accuracy"] > 0.9
    assert summary["dtype"] == "float32"
    assert summary["steps"] == 12 and summary["objective"]["chi2_coef"] == 0.1
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_rewards/accuracies" in entry for entry in steps)
    report = (run / "report.md").read_text()
    pictures = ("loss.png", "preference_accuracy.png", "reward_margins.png", "calibration.png")
    for name in pictures:
        with Image.open(run / name) as picture:
            assert picture.width > 500
        assert f"({name})" in report
    assert f"| {summary['preference_accuracy']:.3f} [" in report
    assert "> What is" in report
    page = (run / "report.html").read_text()
    assert page.count('data-strength="0.5"') == 3  # as many as are answered
    assert "What is" in page and "calibrated" in page and f"{summary['kl_per_token']:.4f}" in page
    model = QAdapterModel.from_pretrained(run)
    assert model.adapter.up.weight.abs().sum() > 0
    assert (run / "checkpoint-12").is_dir()


def test_yaml_and_flags_share_names_and_flags_win(place, tmp_path, capsys):
    flags = dict(zip(*[iter(map(str, train_flags(place)))] * 2, strict=True))
    values = {k.removeprefix("--"): yaml.safe_load(v) for k, v in flags.items()}
    # YAML reads 1e-2 as text; a flag's text and the file's are converted alike.
    assert values["learning_rate"] == "1e-2"
    values |= {"output_dir": str(tmp_path / "run"), "adapter_form": "mlp", "max_steps": 9,
               "answer_prompts": 0, "eval_strategy": "no", "save_strategy": False}
    values["save_strategy"] = "no"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert cli("train", "--config", config, "--max-steps", 3, "--chi2_coef", "0.5") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["adapter"]["form"] == "mlp" and summary["objective"]["chi2_coef"] == 0.5
    assert set(summary["retention"]) == {"texts.txt"}
    # Without checkpoints the adapter is saved all the same.
    assert (tmp_path / "run/adapter_model.safetensors").is_file()


def test_a_lora_is_trained_when_asked_for(place, tmp_path):
    flags = dict(zip(*[iter(map(str, train_flags(place)))] * 2, strict=True))
    del flags["--adapter_rank"]
    lora = ("--adapter_kind", "lora", "--lora_r", 2, "--lora_target_modules", "[q_proj, o_proj]")
    given = [x for flag in flags.items() for x in flag]
    assert cli("train", *given, *lora, "--output_dir", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["adapter"]["kind"], summary["adapter"]["r"]) == ("lora", 2)
    assert summary["adapter"]["target_modules"] == ["o_proj", "q_proj"]
    assert summary["preference_accuracy"] > 0.9
    model = QAdapterModel.from_pretrained(tmp_path / "run")
    assert model.adapts_trunk


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_measuring_does_not_read_what_training_has_read(place, tmp_path, monkeypatch, strategy):
    """The held-out pairs, where training has evaluated on them."""
    given = []

    def noted(*args, base_states=None, **kwargs):
        given.append(base_states)
        return evaluate_preferences(*args, base_states=base_states, **kwargs)

    monkeypatch.setattr(measuring, "evaluate_preferences", noted)
    flags = (*train_flags(place, steps=2), "--eval_strategy", strategy)
    assert cli("train", *flags, "--output_dir", tmp_path) == 0
    assert [states is not None for states in given] == [strategy == "steps"]


def test_resume_continues_and_overwrite_replaces(place, tmp_path):
    flags = (*train_flags(place, steps=4), "--output_dir", tmp_path)
    assert cli("train", *flags) == 0
    (tmp_path / "mine.txt").write_text("kept")
    resumed = (*train_flags(place, steps=8), "--output_dir", tmp_path)
    assert cli("train", *resumed, "--resume_from_checkpoint", "true") == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 8
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) <= 4 and max(steps) == 8
    assert cli("train", *flags, "--overwrite_output_dir") == 0
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4"}
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_test_set_of_its_own_takes_its_prompts_out_of_training(place, tmp_path, capsys):
    write_jsonl(tmp_path / "test.jsonl", preference_rows(6))
    flags = train_flags(place, steps=2)
    assert cli("train", *flags, "--test_dataset_name", tmp_path / "test.jsonl", "--output_dir",
               tmp_path / "run") == 0
    assert "left out of training: 6 pairs" in capsys.readouterr().out
    data = json.loads((tmp_path / "run/summary.json").read_text())["data"]
    assert (data["train"]["total"], data["eval"]["total"]) == (34, 6)


def test_without_held_out_pairs_there_is_no_evaluation(place, tmp_path):
    flags = (*train_flags(place, steps=2), "--output_dir", tmp_path, "--test_fraction", 0)
    assert cli("train", *flags) == 0
    assert "preference_accuracy" not in json.loads((tmp_path / "summary.json").read_text())


def test_dropped_rows_are_shown_and_counted(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    rows = preference_rows(20)
    rows[3]["rejected"] = rows[3]["chosen"]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    flags = (*train_flags(place, steps=2), "--dataset_name", tmp_path / "pairs.jsonl")
    assert cli("train", *flags, "--output_dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "the two answers are the same" in out
    assert "held to the library's own English passages (--retention_coef 30; 0: off)" in out
    data = json.loads((tmp_path / "run/summary.json").read_text())["data"]
    assert {**data["train"]["dropped"], **data["eval"]["dropped"]} == {"identical_answers": 1}


def test_texts_to_be_held_to(place, tmp_path, capsys):
    told = {}
    for name in ("built-in", "own", str(place / "texts.txt")):
        flags = (*train_flags(place, steps=2), "--output_dir", tmp_path / Path(name).stem)
        assert cli("train", *flags, "--retention_dataset_name", name) == 0
        told[name] = squeezed(capsys.readouterr().out)
    assert "held to the library's own English passages (--retention_coef 30; 0: off)" in told.pop(
        "built-in")
    assert "held to the base's own answers to training prompts, sampled first " in told["own"]
    assert "(--retention_coef 10; 0: off)" in told.pop("own")
    [(name, out)] = told.items()
    assert f"held to {name} (--retention_coef 30; 0: off)" in out


# --- eval ---------------------------------------------------------------------------------------


def test_eval_of_an_adapter_agrees_with_its_training_run(place, tmp_path, capsys):
    assert cli("eval", "--model_name_or_path", place / "run", "--dataset_name",
               place / "pairs.jsonl", "--output_dir", tmp_path, "--answer_prompts", 2,
               "--answer_tokens", 3, "--bootstrap_resamples", 20,
               "--retention_file", place / "texts.txt") == 0
    shown = squeezed(capsys.readouterr().out)
    assert "accuracy by reward" in shown and "a coin 0.500" in shown
    result = json.loads((tmp_path / "eval.json").read_text())
    trained = json.loads((place / "run/summary.json").read_text())
    # The texts are the same, so are the numbers; float32 sums in other batches.
    assert result["kl_per_token"] == pytest.approx(trained["kl_per_token"], rel=1e-3)
    assert result["perplexity_base"] == pytest.approx(trained["perplexity_base"], rel=1e-4)
    assert result["dtype"] == "float32"
    assert result["num_pairs"] == 40 and len(result["reliability_bins"]) == 10
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    right = [p["chosen_reward"] > p["rejected_reward"] for p in pairs]
    assert sum(right) / 40 == result["preference_accuracy"]
    assert (tmp_path / "calibration.png").is_file() and (tmp_path / "report.md").is_file()


def test_eval_at_strength_zero_and_of_the_plain_base_agree(place, tmp_path):
    shared = ("--dataset_name", place / "pairs.jsonl", "--answer_prompts", 2, "--answer_tokens", 3,
              "--bootstrap_resamples", 20)
    assert cli("eval", "--model_name_or_path", place / "run", "--strength", 0, "--output_dir",
               tmp_path / "zero", *shared) == 0
    assert cli("eval", "--model_name_or_path", place / "model", "--output_dir",
               tmp_path / "plain", *shared) == 0
    zero, plain = (json.loads((tmp_path / name / "eval.json").read_text())
                   for name in ("zero", "plain"))
    assert zero["answer_kl_per_token"] == zero["kl_per_token"] == 0
    for key in ("preference_accuracy_base", "base_margin", "perplexity_base"):
        assert zero[key] == plain[key]
    assert zero["policy_margin"] == zero["base_margin"]
    assert zero["answers"]["base"] == zero["answers"]["customised"] == plain["answers"]["base"]
    assert "preference_accuracy" not in plain and plain["answers"]["customised"] is None


# --- generate, demo -----------------------------------------------------------------------------


def test_generate_one_prompt_prints_the_answer_alone(place, capsys):
    arguments = ("generate", "--model_name_or_path", place / "run", "--prompt", "What is blue?",
                 "--max_new_tokens", 8)
    assert cli(*arguments) == 0
    first = capsys.readouterr()
    assert cli(*arguments) == 0
    assert capsys.readouterr().out == first.out != ""
    assert "base:" in first.err and "base:" not in first.out


def test_generate_answers_a_file_as_one_by_one(place, tmp_path, capsys):
    prompts = ["What is blue?", [{"role": "user", "content": "Is it hot?"}], "Never?"]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in prompts])
    model = ("generate", "--model_name_or_path", place / "run", "--max_new_tokens", 6)
    assert cli(*model, "--prompts_file", tmp_path / "prompts.jsonl", "--output_file",
               tmp_path / "answers.jsonl") == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == prompts
    (tmp_path / "prompts.txt").write_text("What is blue?\n\nIs it hot?\nNever?\n")
    capsys.readouterr()
    assert cli(*model, "--prompts_file", tmp_path / "prompts.txt", "--batch_size", 1) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["answer"] for a in printed] == [a["answer"] for a in answers]


def test_base_only_is_strength_zero_is_the_plain_model(place, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("What is blue?\nNever?\n")
    shared = ("--prompts_file", tmp_path / "p.txt", "--max_new_tokens", 8)
    outputs = []
    for flags in (("run", "--base_only"), ("run", "--strength", 0), ("model",), ("run",)):
        assert cli("generate", "--model_name_or_path", place / flags[0], *flags[1:], *shared) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]


def test_chat_remembers_resets_and_quits(place, capsys, monkeypatch):
    asked = []

    def remember(model, tokenizer, prompts, **options):
        asked.append([m["content"] for m in prompts[0]])
        return [types.SimpleNamespace(text=f"answer {len(asked)}")]

    monkeypatch.setattr("qadapter.commands.generate.generate_answers", remember)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\n/what\nthree\n/quit\nfour\n"))
    assert cli("generate", "--model_name_or_path", place / "run", "--system", "Be kind.") == 0
    assert asked == [["Be kind.", "one"], ["Be kind.", "one", "answer 1", "two"],
                     ["Be kind.", "three"]]


def test_demo_hands_its_options_on(monkeypatch):
    seen = {}
    module = types.ModuleType("qadapter.demo")
    module.run_demo = lambda **options: seen.update(options)
    monkeypatch.setitem(sys.modules, "qadapter.demo", module)
    assert cli("demo", "--fast", "--output_dir", "there", "--seed", 3) == 0
    assert seen == {"output_dir": "there", "fast": True, "model_name_or_path": "smollm2", "seed": 3}
