"""Ctrl-C and SIGTERM at any moment: one line, the shell's code, and a way to go on."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from tiny_models import cli, preference_rows, save_tiny, write_jsonl
from transformers import TrainerCallback

from qadapter import QAdapterError
from qadapter.console.signals import Terminated, on_termination, raising
from qadapter.training import QAdapterTrainer
from qadapter.training.checkpoints import check_whole, checkpoints_in

WHILE_IMPORTING = """
import os, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Interrupt())
from qadapter.cli import main
main(["train", "--help"])
"""


@pytest.mark.parametrize("name, number", [
    ("qadapter.commands.root", signal.SIGTERM), ("typer", signal.SIGINT),
    ("qadapter.commands.train", signal.SIGINT), ("torch", signal.SIGTERM),
    ("numpy.random", signal.SIGINT),
])
def test_while_libraries_are_imported(name, number):
    told = "interrupted" if number == signal.SIGINT else "terminated"
    done = subprocess.run(
        [sys.executable, "-c", WHILE_IMPORTING.format(name=name, number=int(number))],
        capture_output=True, text=True,
    )
    assert (done.returncode, done.stderr) == (128 + number, f"error: {told}\n")


def test_the_entry_imports_next_to_nothing():
    code = (
        "import sys; before = set(sys.modules); import qadapter.cli\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    heavy = {"typing", "threading", "contextlib", "re", "typer", "logging"}
    assert done.returncode == 0 and not heavy & set(done.stdout.split()), done.stdout


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert cli("info", "--help") == 0
    with pytest.raises(Terminated), raising():
        with on_termination(lambda: True):
            os.kill(os.getpid(), signal.SIGTERM)  # the first asks
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Terminated), on_termination(lambda: True):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Terminated), on_termination(lambda: False):
        os.kill(os.getpid(), signal.SIGTERM)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", [RuntimeError, ImportError, OSError, QAdapterError])
def test_what_a_library_makes_of_an_interrupt_is_one_all_the_same(
    monkeypatch, capfd, number, kind
):
    def run():
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            raise kind("Error calling __set_name__ on 'x'") from None

    monkeypatch.setattr("qadapter.commands.info.run", run)
    assert cli("info") == 128 + number
    told = "interrupted" if number == signal.SIGINT else "terminated"
    assert capfd.readouterr().err == f"error: {told}\n"


def test_in_other_threads_commands_run_without():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli("--version")))
    thread.start()
    thread.join()
    assert codes == [0]


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(12))
    assert cli(*train(folder, "--output_dir", folder / "whole")) == 0
    return folder


def train(place, *more):
    return (
        "train", "--model_name_or_path", place / "model", "--dataset_name", place / "pairs.jsonl",
        "--max_steps", 4, "--adapter_rank", 2, "--answer_prompts", 0, "--bootstrap_resamples", 5,
        "--test_fraction", 0.3, "--per_device_train_batch_size", 2, "--retention_coef", 0, *more,
    )


class Send(TrainerCallback):
    """Sends itself SIGTERM at an event of step 2."""

    def __init__(self, event):
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def terminated(monkeypatch, capfd):
    def run(event, *arguments):
        callbacks = QAdapterTrainer._follow_runs

        def follow(self):
            callbacks(self)
            self.add_callback(Send(event))

        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(QAdapterTrainer, "_follow_runs", follow)
            code = cli(*arguments)
        error = capfd.readouterr().err
        assert code == 143 and "Traceback" not in error
        return error.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize("event, step, strategy", [
    ("on_step_begin", 3, "no"), ("on_pre_optimizer_step", 3, "epoch"),
    ("on_log", 2, "steps"),  # the evaluation that is due is left out
])
def test_a_checkpoint_is_saved_and_the_run_goes_on_from_it(
    place, tmp_path, terminated, event, step, strategy
):
    flags = train(place, "--output_dir", tmp_path / "run", "--save_strategy", strategy,
                  "--logging_steps", 1)
    line = terminated(event, *flags)
    saved = tmp_path / f"run/checkpoint-{step}"
    assert line == (
        f"error: terminated: stopped after step {step} of 4: {saved} is saved: go on from there "
        "with resume_from_checkpoint true"
    )
    assert checkpoints_in(tmp_path / "run")[-1] == saved
    check_whole(saved)
    assert not (tmp_path / "run/adapter_model.safetensors").exists()
    assert not list(tmp_path.rglob("*.lock"))
    assert cli(*flags, "--resume_from_checkpoint", "true") == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_an_evaluation_is_left(place, tmp_path, terminated):
    """It may take longer than the time that is left."""
    flags = train(
        place, "--output_dir", tmp_path, "--eval_steps", 2, "--save_strategy", "no",
        "--per_device_eval_batch_size", 1,
    )
    line = terminated("on_prediction_step", *flags)
    assert f"stopped after step 2 of 4: {tmp_path / 'checkpoint-2'} is saved" in line
    assert cli(*flags, "--resume_from_checkpoint", "true") == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_where_the_best_is_looked_for_no_checkpoint_goes_without_its_evaluation(
    place, tmp_path, terminated
):
    flags = train(
        place, "--output_dir", tmp_path, "--eval_steps", 1, "--save_steps", 1,
        "--load_best_model_at_end", "true", "--per_device_eval_batch_size", 1,
    )
    line = terminated("on_prediction_step", *flags)
    assert "stopped after step 2 of 4: earlier checkpoints are as they were: go on later" in line
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1"]


def test_before_the_first_step_there_is_only_to_start_again(
    place, tmp_path, monkeypatch, capfd
):
    def read(self):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(QAdapterTrainer, "read_base", read)
    assert cli(*train(place, "--output_dir", tmp_path)) == 143
    assert capfd.readouterr().err.splitlines()[-1].startswith(
        "error: terminated: there is no checkpoint yet to go on from: start again later"
    )
    assert not list(tmp_path.iterdir())


def test_in_the_last_step_the_adapter_is_saved(place, tmp_path, terminated):
    flags = train(place, "--output_dir", tmp_path, "--max_steps", 3)
    line = terminated("on_step_begin", *flags)
    assert line == (
        f"error: terminated: the adapter is there, not yet measured: qadapter eval {tmp_path}"
    )
    assert (tmp_path / "adapter_model.safetensors").exists()
