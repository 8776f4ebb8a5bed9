"""The trainer: what a step computes, what is logged, what is saved, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from training_tiny import build_model, build_pairs
from transformers import TrainerCallback

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.training import QAdapterConfig, QAdapterTrainer

LOGGED = {
    "loss", "preference_loss", "chi2_loss", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "values/mean",
}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.adapter.parameters()])


def train_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- the loss of a step -----------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_step_does_not_depend_on_how_it_is_split(make_trainer, pairs, cache):
    """22 pairs at 8 a step leave an incomplete accumulation of 6. Float32 sums in another order
    differ by some 1e-7; SGD keeps that size, where Adam would blow up signs of tiny gradients."""
    runs = {}
    for batch_size, accumulation in ((8, 1), (1, 8), (2, 4)):
        model = build_model()
        optimizer = torch.optim.SGD(model.adapter.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        trainer = make_trainer(
            model, pairs, cache_features=cache, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation, num_train_epochs=3,
            train_sampling_strategy="sequential", optimizers=(optimizer, scheduler),
        )
        trainer.train()
        runs[batch_size] = trainer
    reference = runs.pop(8)
    assert reference.state.global_step == 9
    assert train_logs(reference)[-1]["rewards/margins"] > 0.1  # it moved
    for trainer in runs.values():
        torch.testing.assert_close(weights(trainer), weights(reference), rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(train_logs(trainer), train_logs(reference), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            for name in LOGGED:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("form", ["mlp", "block"])
def test_cached_features_train_like_the_running_base(make_trainer, pairs, form):
    """The same run from features and from tokens, for every alignment and normalisation."""
    adapter = AdapterConfig(form=form, rank=4)
    for objective in (
        ObjectiveConfig(), ObjectiveConfig.authors(),
        ObjectiveConfig(gamma=0.9, length_normalization="completion"),
    ):
        runs = []
        for cache in ("memory", "none"):
            trainer = make_trainer(
                build_model(adapter, objective), pairs, pairs, cache_features=cache,
                num_train_epochs=2, eval_strategy="epoch",
            )
            trainer.train()
            runs.append(trainer)
        torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(*(run.state.log_history for run in runs), strict=True):
            for name in ours.keys() & {"loss", "eval_loss", "eval_chi2_loss", "num_tokens"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_training_learns_and_starts_at_the_base(make_trainer, pairs):
    trainer = make_trainer(
        train=build_pairs(60), evaluation=build_pairs(20, seed=1), num_train_epochs=5
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["eval_preference_loss"] < 0.4
    assert after["eval_rewards/accuracies"] >= 0.9
    margin = after["eval_rewards/chosen"] - after["eval_rewards/rejected"]
    assert after["eval_rewards/margins"] == pytest.approx(margin, rel=1e-5)


# --- metrics ----------------------------------------------------------------------------------


def test_logs_are_means_over_their_window(make_trainer, pairs):
    """Without learning, a window of all steps logs what evaluating all pairs gives."""
    torch.manual_seed(1)
    model = build_model()
    torch.nn.init.normal_(model.adapter.up.weight)
    trainer = make_trainer(
        model, pairs, pairs, learning_rate=0.0, logging_steps=6, per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
    )
    trainer.train()
    logged, evaluated = train_logs(trainer)[-1], trainer.evaluate()
    assert logged["step"] == 6
    for name in LOGGED - {"loss"}:
        assert logged[name] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-5, abs=1e-7), name
    expected = evaluated["eval_preference_loss"] + 0.1 * evaluated["eval_chi2_loss"]
    assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-6)
    tokens = sum(
        2 * len(p["prompt"].split()) + len(p["chosen"].split()) + len(p["rejected"].split()) + 2
        for p in pairs
    )
    assert logged["num_tokens"] == tokens


def test_statistics_are_logged_where_the_base_runs(make_trainer, pairs):
    trainer = make_trainer(train=pairs, cache_features="none", num_train_epochs=3)
    trainer.train()
    first, last = train_logs(trainer)[0], train_logs(trainer)[-1]
    assert first["kl_base_policy"] == pytest.approx(0, abs=1e-6)
    assert last["kl_base_policy"] > 1e-5 and last["kl_policy_base"] > 1e-5
    assert 0 < last["entropy"] < math.log(64)


def test_compute_metrics_gets_rewards(make_trainer, pairs):
    seen = {}

    def accuracy(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"mine": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    trainer = make_trainer(train=pairs, compute_metrics=accuracy, num_train_epochs=4)
    trainer.train()
    metrics = trainer.evaluate(build_pairs(7, seed=2))
    assert seen["shapes"] == ((7, 2), (7,))
    assert metrics["eval_mine"] == pytest.approx(metrics["eval_rewards/accuracies"])
    assert trainer.predict(build_pairs(3, seed=3)).predictions.shape == (3, 2)


def test_evaluation_takes_several_datasets_and_runs_the_base_once(make_trainer, pairs):
    trainer = make_trainer(
        train=pairs, evaluation={"near": build_pairs(5, 1), "far": build_pairs(6, 2)},
        eval_strategy="epoch", num_train_epochs=2,
    )
    trainer.train()
    assert set(trainer.reports) == {"train", "near", "far"}
    features = trainer.eval_dataset["near"]
    metrics = trainer.evaluate()
    assert {"eval_near_loss", "eval_far_rewards/accuracies"} <= metrics.keys()
    assert trainer.eval_dataset["near"] is features


# --- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mlp", "block"])
def test_a_resumed_run_takes_the_same_trajectory(make_trainer, pairs, tmp_path, form):
    adapter = AdapterConfig(form=form, rank=4)
    settings = {
        "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    whole = make_trainer(build_model(adapter), pairs, **settings)
    whole.train()
    assert whole.state.global_step == 9
    # Step 4 is inside the second epoch. What stays is what a run killed after it would leave,
    # and a later checkpoint that was not finished.
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > 4:
            shutil.rmtree(folder)
    (tmp_path / "run" / "checkpoint-5").mkdir()
    resumed = make_trainer(build_model(adapter, seed=0), pairs, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))
    for ours, theirs in zip(train_logs(resumed), train_logs(whole), strict=True):
        assert {n: ours[n] for n in (*LOGGED, "num_tokens")} == {
            n: theirs[n] for n in (*LOGGED, "num_tokens")
        }


def test_checkpoints_and_the_result_load_as_models(make_trainer, pairs, tmp_path):
    trainer = make_trainer(train=pairs, save_strategy="epoch", num_train_epochs=2)
    trainer.train()
    base = build_model().base
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-12"):
        loaded = QAdapterModel.from_pretrained(folder, base=base)
        assert torch.equal(loaded.adapter.up.weight, trainer.model.adapter.up.weight)
        assert not list(folder.glob("*.bin"))
        arguments = json.loads((folder / "training_args.json").read_text())
        assert arguments["alpha_0"] == 1.0
        card = (folder / "README.md").read_text()
        assert "- q-adapter" in card and "kept all 22 pairs" in card and "rewards/margins" in card


def test_the_best_model_is_loaded_at_the_end(make_trainer, pairs):
    class Spoil(TrainerCallback):
        """Ruins the adapter after the second of three epochs."""

        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 12:
                with torch.no_grad():
                    model.adapter.up.weight.mul_(-5.0)

    trainer = make_trainer(
        train=pairs, evaluation=pairs, num_train_epochs=3, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, callbacks=[Spoil()],
    )
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert losses[2] > losses[1]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-12")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-6)


def test_resuming_with_another_objective_or_from_nothing_is_refused(make_trainer, pairs, tmp_path):
    make_trainer(train=pairs, save_strategy="epoch").train()
    other = make_trainer(build_model(objective=ObjectiveConfig(gamma=0.5)), pairs)
    with pytest.raises(QAdapterError, match=r"gamma=1\.0.*gamma=0\.5"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(QAdapterError, match="not a checkpoint"):
        make_trainer(train=pairs).train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(QAdapterError, match="no checkpoint to resume from"):
        make_trainer(train=pairs, output_dir=str(tmp_path / "empty")).train(True)


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(make_trainer, pairs, tmp_path):
    trainer = make_trainer(train=pairs, save_strategy="epoch", num_train_epochs=2)
    save = trainer._save_optimizer_and_scheduler

    def full_disk(folder):
        if folder.endswith("-12"):
            raise OSError(28, "No space left on device")
        save(folder)

    trainer._save_optimizer_and_scheduler = full_disk
    with pytest.raises(QAdapterError, match=r"checkpoint-12.*No space left"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


# --- checks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_loss_that_is_not_finite_names_the_rows(make_trainer, pairs, cache):
    class Poison(TrainerCallback):
        """After two steps the first state, or sequence, of a batch overflows."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.adapter.register_forward_hook(self.overflow)

        def overflow(self, module, inputs, output):
            output = output.clone()
            output[:1] = torch.inf
            return output

    trainer = make_trainer(
        train=pairs, callbacks=[Poison()], cache_features=cache, save_strategy="steps",
        save_steps=1, train_sampling_strategy="sequential",
    )
    with pytest.raises(QAdapterError, match=r"not finite at rows 8 of .* in step 3"):
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    kept = QAdapterModel.from_pretrained(folder / "checkpoint-2", base=trainer.model.base)
    assert torch.equal(kept.adapter.up.weight, trainer.model.adapter.up.weight)


def test_a_parameter_without_gradient_is_named(make_trainer, pairs):
    model = build_model()
    model.adapter.register_parameter("spare", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(QAdapterError, match=r"without gradient .*: adapter\.spare;"):
        make_trainer(model, pairs).train()


def test_a_frozen_adapter_is_not_trained(make_trainer, pairs):
    model = build_model()
    model.adapter.requires_grad_(False)
    trainer = make_trainer(model, pairs, pairs)
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(QAdapterError, match="is_trainable=True"):
        trainer.train()


# --- models and arguments ---------------------------------------------------------------------


def test_a_plain_model_gets_the_adapter_of_the_arguments(make_trainer, pairs, tmp_path, tokenizer):
    base = build_model().base
    trainer = make_trainer(base, pairs, adapter_form="linear", adapter_rank=3, gamma=0.9)
    assert trainer.model.adapter_config == AdapterConfig(form="linear", rank=3)
    assert trainer.model.objective == ObjectiveConfig(gamma=0.9)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    arguments = QAdapterConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, model_init_kwargs={"dtype": "float32"}
    )
    by_name = QAdapterTrainer(str(tmp_path / "base"), arguments, train_dataset=pairs)
    assert by_name.processing_class.eos_token == "</s>"
    by_name.train()


def test_an_objective_is_not_overruled_silently(make_trainer):
    model = build_model(objective=ObjectiveConfig.authors())
    assert make_trainer(model).args.objective_config() == ObjectiveConfig.authors()
    with pytest.raises(QAdapterError, match="its own objective"):
        make_trainer(model, gamma=0.3)


def test_what_cannot_be_honoured_is_refused(make_trainer, pairs):
    for arguments, name in (
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"torch_compile": True}, "torch_compile"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"cache_features": "ram"}, "cache_features"),
        ({"workspace_mb": 0}, "workspace_mb"),
        ({"gamma": 1.5}, "gamma"),
        ({"adapter_rank": 0}, "rank"),
        ({"model_init_kwargs": {"dtype": "auto"}}, "model_init_kwargs"),
    ):
        with pytest.raises(QAdapterError, match=name):
            make_trainer(train=pairs, **arguments)
    with pytest.raises(QAdapterError, match="peft_config"):
        QAdapterTrainer(build_model(), peft_config=object())
    with pytest.raises(QAdapterError, match="data_collator"):
        QAdapterTrainer(build_model(), data_collator=lambda examples: {})
    with pytest.raises(QAdapterError, match="must be a QAdapterConfig"):
        QAdapterTrainer(build_model(), args={})
    with pytest.raises(QAdapterError, match="must be a QAdapterModel"):
        QAdapterTrainer(torch.nn.Linear(2, 2), QAdapterConfig(use_cpu=True))


@pytest.mark.parametrize("name, value", [
    ("learning_rate", math.nan), ("learning_rate", -1.0), ("learning_rate", math.inf),
    ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", 0),
    ("gradient_accumulation_steps", 0), ("warmup_steps", math.nan), ("dataloader_num_workers", -1),
    ("adam_beta1", 2.0), ("adam_beta2", math.nan), ("num_train_epochs", -2.0),
    ("eval_steps", math.nan), ("max_grad_norm", math.nan), ("max_grad_norm", -1.0),
    ("max_steps", -2), ("max_length", 0), ("seed", -1), ("seed", 2**32), ("report_to", "foo"),
])
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(QAdapterError, match=f"^{name}"):
        QAdapterConfig(use_cpu=True, **{name: value})


def test_what_transformers_means_by_its_odd_values_is_kept():
    config = QAdapterConfig(use_cpu=True, max_steps=-1, max_grad_norm=math.inf, learning_rate=0.0)
    assert config.max_steps == -1 and config.report_to == []


def test_reporting_needs_the_package(monkeypatch):
    monkeypatch.setattr("qadapter.training.checks.get_available_reporting_integrations", list)
    with pytest.raises(QAdapterError, match="report_to: wandb is not installed: pip install wandb"):
        QAdapterConfig(use_cpu=True, report_to="wandb")


def test_every_own_option_explains_itself():
    own = QAdapterConfig.__annotations__.keys() - {"_VALID_DICT_FIELDS"}
    fields = QAdapterConfig.__dataclass_fields__
    assert not [name for name in own if not fields[name].metadata.get("help")]
    assert QAdapterConfig(use_cpu=True).objective_config() == ObjectiveConfig()
