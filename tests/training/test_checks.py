"""Options of TrainingArguments that can't be kept are refused by name, before anything runs."""

import sys

import pytest
import torch
from training_tiny import build_model

from qadapter.errors import QAdapterError
from qadapter.training import QAdapterConfig, checks

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def arguments(**changes):
    return QAdapterConfig(**{"output_dir": "unused", "report_to": [], "use_cpu": True, **changes})


@pytest.mark.parametrize("changes, named", [
    ({"optim": "adamw_torhc"}, ["optim", "did you mean 'adamw_torch'"]),
    ({"optim": "lomo"}, ["optim", "backward"]),
    ({"optim": "galore_adamw_layerwise"}, ["optim", "backward"]),
    ({"optim_args": "rank=4"}, ["optim_args", "reads none"]),
    ({"optim_args": "rank"}, ["optim_args"]),
    ({"optim_target_modules": ["up"]}, ["optim_target_modules"]),
    ({"lr_scheduler_type": "cosin"}, ["lr_scheduler_type", "did you mean 'cosine'"]),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"powr": 2}},
     ["lr_scheduler_kwargs", "powr"]),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, ["lr_scheduler_kwargs", "min_lr"]),
    ({"lr_scheduler_kwargs": "{power"}, ["lr_scheduler_kwargs", "JSON"]),
    ({"lr_scheduler_kwargs": "power"}, ["lr_scheduler_kwargs", "JSON"]),
    ({"model_init_kwargs": "[1]"}, ["model_init_kwargs", "map"]),
    ({"eval_strategy": "step"}, ["eval_strategy", "steps"]),
    ({"save_strategy": "never"}, ["save_strategy"]),
    ({"log_level": "loud"}, ["log_level"]),
    ({"dataloader_persistent_workers": True}, ["dataloader_persistent_workers"]),
    ({"dataloader_prefetch_factor": 2}, ["dataloader_prefetch_factor"]),
    ({"dataloader_multiprocessing_context": "spoon"}, ["dataloader_multiprocessing_context"]),
    ({"deepspeed": "zero3.json"}, ["deepspeed"]),
    ({"fsdp": "full_shard"}, ["fsdp", "FSDP1", "distributed_config"]),
    ({"torch_compile_backend": "inductor"}, ["torch_compile_backend"]),
    ({"bf16_full_eval": True}, ["bf16_full_eval", "adapter"]),
    ({"fp16": True}, ["fp16", "GPU"]),
    (EVALUATING | {"load_best_model_at_end": True, "save_steps": 3}, ["load_best_model_at_end"]),
])
def test_refused_by_name(changes, named):
    with pytest.raises(QAdapterError) as error:
        arguments(**changes)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize("optim, module", [
    ("adamw_bnb_8bit", "bitsandbytes"), ("galore_adamw", "galore_torch"),
    ("schedule_free_adamw", "schedulefree"), ("stable_adamw", "optimi"),
])
def test_an_optimizer_without_its_package(optim, module):
    if module in sys.modules:
        pytest.skip(f"{module} is installed")
    with pytest.raises(QAdapterError, match="install") as error:
        arguments(optim=optim)
    assert "optim" in str(error.value) and optim in str(error.value)


@pytest.mark.parametrize("changes", [
    {"optim": "adafactor"}, {"optim": "sgd"}, {"optim": "adamw_torch"}, {"optim": "rmsprop"},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2}'},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
    {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATING},
    {"torch_compile": False}, {"deepspeed": None}, {"fsdp": ""},
])
def test_what_can_be_kept_is_taken(changes):
    arguments(**changes)


def test_pushing_to_the_hub_needs_a_token(monkeypatch):
    monkeypatch.setattr(checks.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checks.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(QAdapterError, match="hub_token"):
        arguments(push_to_hub=True)
    arguments(push_to_hub=True, hub_token="hf_x")
    monkeypatch.setattr(checks.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(QAdapterError, match="HF_HUB_OFFLINE"):
        arguments(push_to_hub=True, hub_token="hf_x")


# --- the best model ------------------------------------------------------------------------------


def check(eval_names=(), cached=True, own_metrics=False, **changes):
    checks.check_evaluation(
        arguments(**changes), eval_names, cached=cached, own_metrics=own_metrics
    )


@pytest.mark.parametrize("metric", [
    "loss", "eval_loss", "rewards/accuracies", "eval_rewards/margins", "chi2_loss", "eval_runtime",
])
def test_known_metrics(metric):
    check(**EVALUATING, load_best_model_at_end=True, metric_for_best_model=metric)


def test_an_unknown_metric_offers_the_nearest():
    with pytest.raises(QAdapterError, match="did you mean 'rewards/accuracies'"):
        check(**EVALUATING, metric_for_best_model="eval_rewards/accuracy")
    with pytest.raises(QAdapterError, match="metric_for_best_model"):
        check(**EVALUATING, metric_for_best_model="entropy")
    check(**EVALUATING, metric_for_best_model="entropy", cached=False)
    check(**EVALUATING, metric_for_best_model="mine", own_metrics=True)


def test_of_several_sets_one_is_named():
    check(("a", "b"), **EVALUATING, metric_for_best_model="eval_b_loss")
    with pytest.raises(QAdapterError, match="a_loss"):
        check(("a", "b"), **EVALUATING, metric_for_best_model="loss")


@pytest.mark.parametrize("changes, names, named", [
    ({"load_best_model_at_end": True}, (), "load_best_model_at_end"),
    ({"load_best_model_at_end": True, "save_strategy": "best", "eval_strategy": "no"}, (),
     "load_best_model_at_end"),
    ({"save_strategy": "best", "metric_for_best_model": "loss"}, (), "save_strategy best"),
    ({"save_strategy": "best", "eval_strategy": "epoch"}, (), "metric_for_best_model"),
    ({"eval_strategy": "epoch"}, None, "eval_strategy"),
])
def test_nothing_to_choose_by(changes, names, named):
    changes = {"save_strategy": "no"} | changes
    with pytest.raises(QAdapterError, match=named):
        check(names, **changes)


def test_no_evaluation_before_the_end(make_trainer, pairs):
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 50,
                "eval_steps": 50, "load_best_model_at_end": True}
    with pytest.raises(QAdapterError, match="eval_steps 50 is beyond the last of 6 steps"):
        make_trainer(train=pairs, evaluation=pairs, **settings).train()


def test_an_unknown_metric_stops_before_the_base_runs(make_trainer, pairs, monkeypatch):
    with pytest.raises(QAdapterError, match="metric_for_best_model"):
        make_trainer(train=pairs, evaluation=pairs, eval_strategy="epoch",
                     metric_for_best_model="accuracy")


# --- precision and checkpointing -----------------------------------------------------------------


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_bf16_trains_on_a_cpu_and_leaves_the_model_as_it_was(make_trainer, pairs, cache):
    model, ids = build_model(), torch.tensor([[1, 5, 9]])
    trainer = make_trainer(model, train=pairs, bf16=True, cache_features=cache, use_cpu=False)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] < 1
    assert {p.dtype for p in model.adapter.parameters()} == {torch.float32}
    assert torch.equal(model(ids).logits, type(model).forward(model, ids).logits)


def test_features_under_mixed_precision_are_others(make_trainer, pairs, tmp_path):
    settings = {"train": pairs, "cache_features": "disk", "feature_cache_dir": str(tmp_path / "c")}
    for bf16 in (False, True, True):
        make_trainer(**settings, bf16=bf16).train()
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_checkpointing_a_frozen_trunk_does_nothing_and_says_so(make_trainer, pairs):
    plain = make_trainer(train=pairs)
    plain.train()
    lines = []
    name = next(n for n in checks.CHECKPOINTING if hasattr(plain.args, n))
    for option in (name, "gradient_checkpointing"):
        trainer = make_trainer(train=pairs, **{option: True}, say=lines.append)
        trainer.train()
        assert [h.get("loss") for h in trainer.state.log_history] == [
            h.get("loss") for h in plain.state.log_history
        ]
    assert len([line for line in lines if "checkpointing does nothing" in line]) == 2
