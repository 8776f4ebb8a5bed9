"""A run goes on from a whole checkpoint, on the options and data it had, or says what is wrong."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training_tiny import build_model, build_pairs, build_tokenizer
from transformers import EarlyStoppingCallback, TrainerCallback

from qadapter import QAdapterModel
from qadapter.errors import QAdapterError
from qadapter.system import manifest
from qadapter.training import QAdapterConfig, QAdapterTrainer, checkpoints
from qadapter.training.checkpoints import check_whole, checkpoints_in, find_checkpoint
from qadapter.training.resuming import check_optimizer, check_schedule

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "weight_decay": 0.01}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.adapter.parameters()])


def names(folder):
    return [path.name for path in checkpoints_in(folder)]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tokenizer):
    """A run of six steps (an epoch) and its checkpoints; the weights it ended with."""
    folder = tmp_path_factory.mktemp("done") / "run"
    trainer = QAdapterTrainer(
        build_model(), config(folder), train_dataset=build_pairs(22), processing_class=tokenizer,
    )
    trainer.train()
    return folder, weights(trainer)


def config(folder, **changes):
    return QAdapterConfig(**{
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 0, "report_to": "none",
        "retention_coef": 0.0, **SETTINGS, **changes,
    })


@pytest.fixture
def run(done, tmp_path):
    """A copy that stopped after step 4."""
    shutil.copytree(done[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    return tmp_path / "run"


# --- what is whole ------------------------------------------------------------------------------


def test_a_manifest_lists_all_that_is_read_and_not_the_card(done):
    folder = done[0] / "checkpoint-4"
    listed = manifest.read(folder / "manifest.json").files
    there = {path.name for path in folder.iterdir()} - {"README.md", "manifest.json"}
    assert set(listed) == there and {"optimizer.pt", "rng_state.pth", "resuming.json"} <= there
    (folder / "README.md").write_text("what I made of it")
    check_whole(folder)
    for folder in (done[0], done[0] / "checkpoint-2"):
        assert QAdapterModel.from_pretrained(folder, base=build_model().base)


@pytest.mark.parametrize("name", [
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.json",
    "adapter_model.safetensors", "qadapter_config.json", "resuming.json", "manifest.json",
    "tokenizer.json",
])
def test_without_or_with_anothers_file_the_one_before_is_taken(
    make_trainer, pairs, run, done, name
):
    """Gone, of another checkpoint, a folder, a link to itself: and the end is the same."""
    broken, said, theirs = run / "checkpoint-4", [], done[0] / "checkpoint-4" / name
    for number, damage in enumerate((
        Path.unlink, lambda file: shutil.copy(run / "checkpoint-2" / name, file),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.unlink(), file.symlink_to(file.name)),
    )):
        if number == 1 and (run / "checkpoint-2" / name).read_bytes() == theirs.read_bytes():
            continue  # it is the same in both
        shutil.rmtree(broken)
        shutil.copytree(done[0] / "checkpoint-4", broken)
        damage(broken / name)
        said.clear()
        assert find_checkpoint(run, True, said.append) == str(run / "checkpoint-2")
        assert len(said) == 1 and str(broken) in said[0]
        assert name == "manifest.json" or str(broken / name) in said[0]
        with pytest.raises(QAdapterError, match="checkpoint-4"):
            find_checkpoint(run, str(broken))
    resumed = make_trainer(
        build_model(seed=0), pairs, output_dir=str(run), say=said.append, **SETTINGS
    )
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), done[1])
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for folder in checkpoints_in(run):
        check_whole(folder)


def test_what_a_kill_left_in_a_whole_checkpoint_goes(make_trainer, pairs, run, done):
    for folder in (run, run / "checkpoint-2", run / "checkpoint-4"):
        left = folder / ".qadapter-saving-abcd1234"
        left.mkdir()
        for name in (".owner.lock", "manifest.json"):
            (left / name).write_text("{}")
    trainer = make_trainer(train=pairs, output_dir=str(run), **SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(trainer), done[1]) and not list(run.rglob(".*"))


def test_saved_without_the_optimizer(make_trainer, pairs, tmp_path):
    make_trainer(train=pairs, save_only_model=True, **SETTINGS).train()
    with pytest.raises(QAdapterError, match=r"saved with save_only_model.*is_trainable=True"):
        find_checkpoint(tmp_path / "run", str(tmp_path / "run/checkpoint-4"))
    with pytest.raises(QAdapterError, match=r"no checkpoint to resume from.*save_only_model"):
        find_checkpoint(tmp_path / "run", True)


def test_nothing_to_go_on_from_says_how_to_go_on(tmp_path):
    for made in (False, True):
        if made:
            (tmp_path / "run/checkpoint-3").mkdir(parents=True)
            (tmp_path / "run/checkpoint-3/trainer_state.json").write_text("{}")
        with pytest.raises(QAdapterError) as caught:
            find_checkpoint(tmp_path / "run", True)
        assert "start again without resume_from_checkpoint" in str(caught.value)
        assert ("checkpoint-3 was never finished" in str(caught.value)) == made


@pytest.mark.parametrize("interrupted", ["_save_rng_state", "_rotate"])
def test_one_that_is_written_again_is_not_whole_until_it_is_done(
    make_trainer, pairs, run, done, monkeypatch, interrupted
):
    """The run's earlier checkpoint-4 was another's. Killed while it is replaced, and after."""
    class Killed(BaseException):
        pass

    def killed(self, *_):
        if self.state.global_step == 4:
            raise Killed

    trainer = make_trainer(build_model(seed=0), pairs, output_dir=str(run), **SETTINGS)
    monkeypatch.setattr(type(trainer), interrupted, killed)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    monkeypatch.undo()
    last = find_checkpoint(run, True)
    assert last.endswith("checkpoint-2" if interrupted == "_save_rng_state" else "checkpoint-4")
    resumed = make_trainer(build_model(seed=0), pairs, output_dir=str(run), **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), done[1])


def test_the_one_saved_last_is_the_last(make_trainer, pairs, run, done):
    """Gone back to step 2 with a shorter way between checkpoints: step 4 is of another time."""
    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise Killed

    trainer = make_trainer(
        build_model(seed=0), pairs, output_dir=str(run), callbacks=[Kill()],
        **SETTINGS | {"save_steps": 1},
    )
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert names(run) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert find_checkpoint(run, True) == str(run / "checkpoint-3")


def test_killed_after_the_last_step_there_is_none_to_take(make_trainer, pairs, tmp_path):
    """In the middle of an epoch: transformers itself takes one more."""
    settings = SETTINGS | {"max_steps": 4}
    trainer = make_trainer(build_model(), pairs, **settings)
    trainer.train()
    ended = weights(trainer)
    (tmp_path / "run/adapter_model.safetensors").unlink()
    resumed = make_trainer(build_model(), pairs, **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert torch.equal(weights(resumed), ended) and resumed.state.global_step == 4
    saved = QAdapterModel.from_pretrained(tmp_path / "run", base=build_model().base)
    assert torch.equal(weights_of(saved), ended)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.adapter.parameters()])


# --- old ones -----------------------------------------------------------------------------------


def test_rotation_keeps_what_is_not_its_own(make_trainer, pairs, tmp_path):
    folder = tmp_path / "run"
    for name in ("checkpoint-2-backup", "checkpoint-x", "checkpoint-", "my-checkpoint-1"):
        (folder / name).mkdir(parents=True)
        (folder / name / "mine").write_text("")
    (folder / "checkpoint-9").symlink_to("checkpoint-9")
    (folder / "checkpoint-7").write_text("a file")
    (folder / "checkpoint-1").mkdir()  # left by a killed run: the first to go
    (folder / "checkpoint-1/optimizer.pt").write_text("cut")
    theirs = {path.name for path in folder.iterdir()} - {"checkpoint-1"}
    trainer = make_trainer(train=pairs, save_total_limit=2, **SETTINGS)
    trainer.train()
    assert names(folder) == ["checkpoint-4", "checkpoint-6"]
    assert theirs <= {path.name for path in folder.iterdir()}
    assert (folder / "checkpoint-2-backup/mine").exists()
    assert trainer.args.save_total_limit == 2
    for arguments in folder.rglob("training_args.json"):
        assert json.loads(arguments.read_text())["save_total_limit"] == 2


def test_a_rotation_that_a_kill_ended_is_ended_by_the_next_run(make_trainer, pairs, tmp_path):
    folder = tmp_path / "run"
    make_trainer(train=pairs, save_total_limit=3, **SETTINGS).train()
    (folder / "checkpoint-2/manifest.json").unlink()  # it was about to go
    make_trainer(train=pairs, save_total_limit=2, **SETTINGS).train(resume_from_checkpoint=True)
    assert names(folder) == ["checkpoint-4", "checkpoint-6"]


def test_rotation_waits_for_the_new_one_and_a_kill_leaves_no_half(
    make_trainer, pairs, tmp_path, monkeypatch
):
    folder, seen = tmp_path / "run", []

    def noted(path):
        seen.append(names(folder))
        check_whole(folder / seen[-1][-1])
        return remove(path)

    remove = checkpoints.remove_checkpoint
    monkeypatch.setattr(checkpoints, "remove_checkpoint", noted)
    make_trainer(train=pairs, save_total_limit=1, **SETTINGS).train()
    assert seen == [["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as kill:
        kill.setattr("shutil.rmtree", killed)
        with pytest.raises(Killed):
            remove(folder / "checkpoint-6")
    assert names(folder) == []  # it is nowhere half


def test_the_best_is_kept(make_trainer, pairs, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.adapter.up.weight.mul_(-5.0)

    for limit in (2, 1):
        trainer = make_trainer(
            train=pairs, evaluation=pairs, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, callbacks=[Spoil()], save_total_limit=limit,
            output_dir=str(tmp_path / f"keep-{limit}"), **SETTINGS,
        )
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.name == "checkpoint-2" and best.is_dir()
        kept = names(tmp_path / f"keep-{limit}")
        assert kept == (["checkpoint-2"] if limit == 1 else ["checkpoint-2", "checkpoint-6"])


# --- options and data ---------------------------------------------------------------------------


@pytest.mark.parametrize("changes, told", [
    ({"learning_rate": 2e-2}, "learning_rate 0.01, this run 0.02"),
    ({"weight_decay": 0.5, "seed": 3}, "weight_decay 0.01, this run 0.5; seed 0, this run 3"),
    ({"lr_scheduler_type": "constant"}, "lr_scheduler_type 'linear', this run 'constant'"),
    ({"warmup_steps": 0}, "warmup_steps 0.1, this run 0"),
    ({"per_device_train_batch_size": 2}, "4 pairs a step.*this run 2"),
    ({"gradient_accumulation_steps": 2}, "4 pairs a step.*this run 8"),
    ({"optim": "sgd"}, "optim 'adamw_torch.*this run 'sgd'"),
    ({"max_grad_norm": 0.1}, "max_grad_norm 1.0, this run 0.1"),
    ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
])
def test_options_that_change_the_way_are_named(make_trainer, pairs, run, changes, told):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    trainer = make_trainer(train=pairs, output_dir=str(run), **SETTINGS | changes)
    with pytest.raises(QAdapterError, match=told) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert "go on with the same options" in str(caught.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_the_same_step_cut_otherwise_goes_on(make_trainer, pairs, run, done):
    said = []
    trainer = make_trainer(
        train=pairs, output_dir=str(run), say=said.append,
        **SETTINGS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    trainer.train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(trainer), done[1], atol=1e-6, rtol=1e-4)
    assert not [line for line in said if "checkpoint" in line]


def test_another_length_is_honoured_and_said(make_trainer, pairs, run):
    said = []
    trainer = make_trainer(
        train=pairs, output_dir=str(run), say=said.append, **SETTINGS | {"max_steps": 8}
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert ["max_steps 6 before, 8 now" in line for line in said if "checkpoint" in line] == [True]


def test_other_pairs_are_named(make_trainer, run, done):
    turned = build_pairs(22).select(range(21, -1, -1))
    for pairs in (build_pairs(22, seed=1), build_pairs(21), turned):
        trainer = make_trainer(train=pairs, output_dir=str(run), **SETTINGS)
        with pytest.raises(QAdapterError, match="trained on other pairs"):
            trainer.train(resume_from_checkpoint=True)
    shorter = make_trainer(train=build_pairs(22), output_dir=str(run), max_length=9, **SETTINGS)
    with pytest.raises(QAdapterError, match=r"trained on other pairs.*max_length"):
        shorter.train(resume_from_checkpoint=True)
    trainer = make_trainer(train=build_pairs(22), output_dir=str(run), **SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))  # now they are features
    assert torch.equal(weights(trainer), done[1])


def test_other_retention_texts_are_named(make_trainer, pairs, tmp_path, tokenizer):
    def trainer(texts):
        return QAdapterTrainer(
            build_model(), config(tmp_path / "held", retention_coef=0.1, retention_states=4),
            train_dataset=pairs, processing_class=tokenizer, retention_dataset=texts,
        )

    texts = ["w1 w2 w3 w4", "w5 w6 w7"]
    trainer(texts).train()
    with pytest.raises(QAdapterError, match="other retention texts"):
        trainer(texts[::-1]).train(resume_from_checkpoint=True)
    assert trainer(texts).train(resume_from_checkpoint=True).global_step == 6
    with pytest.raises(QAdapterError, match=r"retention_coef 0\.1, this run 0\.0"):
        QAdapterTrainer(
            build_model(), config(tmp_path / "held"), train_dataset=pairs,
            processing_class=tokenizer,
        ).train(resume_from_checkpoint=True)


# --- optimizer and schedule -----------------------------------------------------------------------


def optimizers():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    for kind, options in (
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}), (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adafactor, {"lr": 0.1}), (torch.optim.Adagrad, {"lr": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.1}),
    ):
        yield kind([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.2}], **options)


def stepped(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_what_an_optimizer_saves_is_its_own(tmp_path):
    for made, other in zip(optimizers(), optimizers(), strict=True):
        torch.save(stepped(made).state_dict(), tmp_path / "optimizer.pt")
        parameters = [p for group in other.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters], str(other.state_dict())
        check_optimizer(tmp_path / "optimizer.pt", other)
        assert str(other.state_dict()) == before[1]  # looked at, not touched
        assert all(torch.equal(a, b) for a, b in zip(before[0], parameters, strict=True))


def spoil(state, path, value):
    *inner, last = path
    for key in inner:
        state = state[key]
    if value is None:
        del state[last]
    else:
        state[last] = value


@pytest.mark.parametrize("path, value, told", [
    (("state", 0, "exp_avg"), torch.zeros(99, 7), r"exp_avg of parameter 0 is .*\[99, 7\], not"),
    (("state", 0, "exp_avg"), torch.zeros(()), "exp_avg of parameter 0"),
    (("state", 1, "exp_avg_sq"), torch.zeros(2, dtype=torch.float64), "float64"),
    (("state", 1, "exp_avg_sq"), torch.zeros(2, dtype=torch.int8), "int8"),
    (("state", 0, "exp_avg"), torch.full((2, 3), torch.nan), "not finite"),
    (("state", 0, "step"), torch.tensor(torch.inf), "not finite"),
    (("state", 0, "step"), "three", "step of parameter 0 is no tensor"),
    (("state", 0, "exp_avg"), None, "has .*not "),
    (("state", 0), None, "parameter 0 has"),
    (("state", 5), {}, "numbered"),
    (("state", 0, "extra"), torch.zeros(1), "extra"),
    (("param_groups", 0), None, "1 groups of parameters, not 2"),
    (("param_groups", 0, "params"), [0, 1, 2], "has not 1 parameters"),
    (("param_groups", 1, "params"), [0], "numbered twice"),
    (("param_groups", 0, "lr"), float("nan"), "lr is nan"),
    (("param_groups", 0, "lr"), -1.0, "lr is -1.0"),
    (("param_groups", 0, "amsgrad"), 10**30, "amsgrad is 1000"),
    (("param_groups", 0, "betas"), None, "no betas"),
    (("param_groups", 0, "weight_decay"), 0.7, "weight_decay is 0.7, not 0.1"),
    (("param_groups",), None, "no state and param_groups"),
    (("state",), [], "no state and param_groups"),
])
def test_what_is_no_state_of_the_optimizer_never_reaches_torch(tmp_path, path, value, told):
    optimizer = next(optimizers())
    state = stepped(next(optimizers())).state_dict()
    spoil(state, path, value)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(QAdapterError, match=told) as caught:
        check_optimizer(tmp_path / "optimizer.pt", optimizer)
    assert str(tmp_path / "optimizer.pt") in str(caught.value)
    assert not optimizer.state


class Runs:
    """A pickle that would run."""

    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("made", [Runs(), np.zeros(3), [1, 2], "text"])
def test_objects_that_training_does_not_save(tmp_path, made, capfd):
    torch.save(made, tmp_path / "optimizer.pt")
    with pytest.raises(QAdapterError, match=r"optimizer\.pt (can't be read|is not this run's)"):
        check_optimizer(tmp_path / "optimizer.pt", next(optimizers()))
    (tmp_path / "optimizer.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(QAdapterError, match=r"optimizer\.pt can't be read"):
        check_optimizer(tmp_path / "optimizer.pt", next(optimizers()))
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("key, value", [
    ("last_epoch", None), ("last_epoch", "4"), ("last_epoch", float("nan")), ("last_epoch", 5),
    ("last_epoch", -1), ("last_epoch", 1.5),
    ("base_lrs", [0.3, 0.2]), ("base_lrs", [0.1]), ("base_lrs", 0.1),
    ("_last_lr", [float("inf"), 0.1]),
])
def test_what_is_no_state_of_the_schedule(tmp_path, key, value):
    schedule = torch.optim.lr_scheduler.LambdaLR(next(optimizers()), lambda step: 1.0)
    path = tmp_path / "scheduler.pt"
    torch.save(schedule.state_dict(), path)
    check_schedule(path, schedule, 4)
    torch.save(schedule.state_dict() | {key: value}, path)
    with pytest.raises(QAdapterError, match=rf"scheduler\.pt is not this run's schedule.*{key}"):
        check_schedule(path, schedule, 4)
    torch.save([1], path)
    with pytest.raises(QAdapterError, match="not this run's schedule"):
        check_schedule(path, schedule, 4)


@pytest.mark.parametrize("path, value", [
    (("global_step",), -4), (("global_step",), 4.0), (("global_step",), None),
    (("num_input_tokens_seen",), ""), (("train_batch_size",), [[]]), (("log_history",), [1]),
    (("best_model_checkpoint",), 1.5), (("stateful_callbacks",), []), (("mine",), 1), ((), []),
    (("global_step",), 10**30),
])
def test_a_state_that_transformers_would_trip_over(make_trainer, pairs, run, path, value):
    file = run / "checkpoint-4/trainer_state.json"
    state = json.loads(file.read_text())
    if path:
        spoil(state, path, value)
    file.write_text(json.dumps(state if path else value))
    listed = manifest.read(run / "checkpoint-4/manifest.json").files
    manifest.write(run / "checkpoint-4", listed)
    trainer = make_trainer(train=pairs, output_dir=str(run), **SETTINGS)
    with pytest.raises(QAdapterError, match="checkpoint-4"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_a_callback_that_the_checkpoint_does_not_know(make_trainer, pairs, run, done):
    callback = EarlyStoppingCallback(early_stopping_patience=9)
    trainer = make_trainer(
        train=pairs, evaluation=pairs, output_dir=str(run), callbacks=[callback],
        eval_strategy="steps", eval_steps=2, metric_for_best_model="loss",
        load_best_model_at_end=True, **SETTINGS,
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and "checkpoint-6" in names(run)


def test_a_strangers_optimizer_under_a_manifest_of_its_own(make_trainer, pairs, run):
    """Whoever writes the manifest too is stopped where it would have ended in a crash."""
    path = run / "checkpoint-4/optimizer.pt"
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, path)
    listed = manifest.read(run / "checkpoint-4/manifest.json").files
    manifest.write(run / "checkpoint-4", listed)
    trainer = make_trainer(train=pairs, output_dir=str(run), **SETTINGS)
    with pytest.raises(QAdapterError, match=r"optimizer\.pt is not this run's optimizer"):
        trainer.train(resume_from_checkpoint=True)


# --- what is not saved --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_last_step_that_blows_up_is_not_saved(make_trainer, pairs, tmp_path, strategy):
    class BlowUp(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                with torch.no_grad():
                    model.adapter.up.weight[0, 0] = torch.inf

    trainer = make_trainer(
        train=pairs, callbacks=[BlowUp()], **SETTINGS | {"save_strategy": strategy}
    )
    with pytest.raises(QAdapterError, match=r"step 6 the adapter is not finite \(adapter\.up"):
        trainer.train()
        trainer.save_model()
    saved = ["checkpoint-2", "checkpoint-4"] if strategy == "steps" else []
    assert names(tmp_path / "run") == saved
    assert not (tmp_path / "run/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_what_is_kept_does_not_grow_with_the_steps(pairs, tmp_path):
    """Neither with logging off, where nothing is averaged and forgotten."""
    class Count(TrainerCallback):
        def __init__(self):
            self.counts = {}

        def on_step_end(self, args, state, control, **kwargs):
            self.counts[state.global_step] = sum(
                isinstance(thing, torch.Tensor) for thing in gc.get_objects()
            )

    count = Count()
    trainer = QAdapterTrainer(
        build_model(), config(tmp_path, save_strategy="no", logging_strategy="no", max_steps=40,
                              retention_coef=0.1, retention_states=4),
        train_dataset=pairs, processing_class=build_tokenizer(), callbacks=[count],
        retention_dataset=["w1 w2 w3 w4", "w5 w6 w7"],
    )
    trainer.train()
    assert count.counts[40] <= count.counts[10] + 3
