"""Samples while training: printed, in a file, on trackers; and training is what it is without."""

from __future__ import annotations

import json

import pytest
import torch
from data.tiny import chatml
from tiny_models import cli, preference_rows, save_tiny_inputs, tiny_adapter
from transformers import TrainerCallback

from qadapter import QAdapterConfig, QAdapterError, QAdapterTrainer
from qadapter.evaluation import generate_answers
from qadapter.training.completions import FILE_NAME, LogCompletions

LOGGED = {"log_completions": True, "num_completions_to_print": 3, "max_completion_length": 5}


def trainer(folder, model=None, *, held_out=True, **changes):
    said = []
    options = {
        "output_dir": str(folder), "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2,
        "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "retention_coef": 0, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "cache_features": "memory",
    }
    made = QAdapterTrainer(
        model or tiny_adapter(trained=False), QAdapterConfig(**options | changes),
        train_dataset=preference_rows(16), processing_class=chatml(), say=said.append,
        eval_dataset=(held_out and preference_rows(32)[16:]) or None,
    )
    return made, said


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_answers_are_the_policys_and_training_is_as_without(tmp_path):
    run, said = trainer(tmp_path / "with", **LOGGED)
    run.train()
    rows = rows_of(tmp_path / "with")
    assert [row["step"] for row in rows] == [0] * 3 + [2] * 3 + [4] * 3
    prompts = [row["prompt"] for row in rows[:3]]
    assert len(set(prompts)) == 3 and all("What is" in prompt for prompt in prompts)
    assert all(row["reward"] == 0 for row in rows[:3]) and rows[-1]["reward"] != 0
    [ids] = (each.prompts for each in run.callback_handler.callbacks
             if isinstance(each, LogCompletions))
    assert prompts == [chatml().decode(x, skip_special_tokens=True).strip() for x in ids]
    for step, strength in ((0, 0.0), (4, 1.0)):
        answers = generate_answers(
            run.model, chatml(), ids, strength=strength, max_new_tokens=5
        )
        assert [r["completion"] for r in rows if r["step"] == step] == [a.text for a in answers]
    assert sum(line.startswith("step 2: ") for line in said) == 3
    without, _ = trainer(tmp_path / "without")
    without.train()
    assert not (tmp_path / "without" / FILE_NAME).exists()
    for a, b in zip(run.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_has_each_step_once(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    broken, _ = trainer(tmp_path, **LOGGED, eval_delay=0)
    broken.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 3, "prompt": "of the run that broke"}\n{"step": 3, "pro')
    again, _ = trainer(tmp_path, **LOGGED)
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in rows_of(tmp_path)] == [0] * 3 + [2] * 3 + [4] * 3


@pytest.mark.parametrize("changes", [
    {"eval_strategy": "no"}, {"held_out": False, "eval_strategy": "no"},
])
def test_it_needs_held_out_prompts(tmp_path, changes):
    with pytest.raises(QAdapterError, match="log_completions needs held-out prompts"):
        trainer(tmp_path, **LOGGED | changes)


def test_tensorboard_gets_numbers_and_samples(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, _ = trainer(tmp_path, **LOGGED | {"report_to": ["tensorboard"], "logging_steps": 1})
    run.train()
    [events] = tmp_path.rglob("events.out.tfevents.*")
    found = reader.EventAccumulator(str(events.parent)).Reload()
    assert {"train/loss", "train/rewards/margins", "eval/rewards/accuracies"} <= set(
        found.Tags()["scalars"]
    )
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]
    assert found.Scalars("train/loss")[0].value == pytest.approx(run.state.log_history[0]["loss"])
    texts = found.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    assert b"What is" in texts[-1].tensor_proto.string_val[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("completions"), pairs=12)


def test_the_command_logs_some_and_can_be_told_not_to(place, tmp_path, capsys):
    command = ("train", "--model_name_or_path", place / "model", "--dataset_name",
               place / "pairs.jsonl", "--max_steps", 2, "--answer_prompts", 0,
               "--bootstrap_resamples", 5, "--retention_coef", 0, "--max_completion_length", 4)
    assert cli(*command, "--output_dir", tmp_path / "a", "--test_fraction", 0.3) == 0
    assert {row["step"] for row in rows_of(tmp_path / "a")} == {0, 1, 2}
    assert "step 2: " in capsys.readouterr().out
    for more in (("--no_log_completions", "--test_fraction", 0.3), ("--test_fraction", 0)):
        assert cli(*command, "--output_dir", tmp_path / "b", "--overwrite_output_dir", *more) == 0
        assert not (tmp_path / "b" / FILE_NAME).exists()
    assert cli(*command, "--output_dir", tmp_path / "c", "--test_fraction", 0,
               "--log_completions") == 2
    assert "log_completions needs held-out" in " ".join(capsys.readouterr().err.split())
