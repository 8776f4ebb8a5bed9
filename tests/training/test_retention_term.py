"""The retention term against KL(π‖π̃) written out, and its place in the trainer."""

from __future__ import annotations

import pytest
import torch
from training_tiny import build_model, build_pairs, build_tokenizer
from transformers import TrainerCallback

from qadapter import ObjectiveConfig, QAdapterError
from qadapter.training import QAdapterConfig, QAdapterTrainer
from qadapter.training.retention import RetentionStates, as_texts

TEXTS = ["w1 w2 w3 w4 w5", "w9 w8 w7", "w30 w31 w32 w33 w34 w35 w36"]
OBJECTIVES = (
    ObjectiveConfig(),
    ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.7),
    ObjectiveConfig(alpha_0=0.2, alpha_tilde=1.5, parametrization="q"),
)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=("default", "policy", "q"))
def test_divergence_and_its_gradient_equal_the_definition(objective):
    model = build_model(objective=objective, dtype=torch.float64)
    model.adapter.double()
    torch.nn.init.normal_(model.adapter.up.weight, std=0.3)
    states = RetentionStates(model, build_tokenizer(), TEXTS)
    assert len(states) == sum(len(text.split()) - 1 for text in TEXTS)

    picked = torch.tensor([0, 3, 3, 7])
    ours = states.divergence(model, picked)
    hidden = states.hidden_MD[picked]
    logpi = model.head(hidden).log_softmax(-1)
    logp = model.policy_logits(hidden).log_softmax(-1)
    theirs = (logpi.exp() * (logpi - logp)).sum(-1)
    # The constants' gradient is taken in float32: 1e-6 of values of order 1.
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)
    parameters = list(model.adapter.parameters())
    for mine, right in zip(
        torch.autograd.grad(ours.sum(), parameters, retain_graph=True),
        torch.autograd.grad(theirs.sum(), parameters), strict=True,
    ):
        torch.testing.assert_close(mine, right, atol=5e-6, rtol=1e-5)


def test_an_untrained_adapter_has_not_drifted():
    model = build_model()
    states = RetentionStates(model, build_tokenizer(), TEXTS)
    assert states.divergence(model, torch.arange(len(states))).abs().max() < 1e-6


class _Losses(TrainerCallback):
    def __init__(self):
        self.kl = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "retention_kl" in logs:
            self.kl.append(logs["retention_kl"])


def _train(tmp_path, **arguments):
    losses = _Losses()
    settings = {
        "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "seed": 0,
        "per_device_train_batch_size": 8, "num_train_epochs": 4,
    }
    model = build_model()
    trainer = QAdapterTrainer(
        model, QAdapterConfig(**{**settings, **arguments}), train_dataset=build_pairs(16),
        processing_class=build_tokenizer(), callbacks=[losses],
        retention_dataset=TEXTS if arguments.get("retention_coef") else None,
    )
    trainer.train()
    states = RetentionStates(model, build_tokenizer(), TEXTS)
    drift = states.divergence(model, torch.arange(len(states))).mean().item()
    return losses.kl, drift, model


def test_the_term_keeps_the_policy_near_the_base_where_it_is_told_to(tmp_path):
    _, free, _ = _train(tmp_path, learning_rate=0.1)
    logged, held, _ = _train(tmp_path, learning_rate=0.1, retention_coef=300.0)
    assert len(logged) == 8 and logged[0] < 1e-6 < logged[-1]
    assert held < free / 2


def test_the_term_does_not_depend_on_how_a_step_is_split(tmp_path):
    _, _, whole = _train(tmp_path, retention_coef=5.0)
    _, _, split = _train(
        tmp_path, retention_coef=5.0, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    for mine, other in zip(whole.adapter.parameters(), split.adapter.parameters(), strict=True):
        # Eight Adam steps of float32 sums taken in another order.
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_what_cannot_be_used_is_named(tmp_path):
    arguments = QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, retention_coef=1.0)
    with pytest.raises(QAdapterError, match="need each other"):
        QAdapterTrainer(build_model(), arguments, processing_class=build_tokenizer())
    with pytest.raises(QAdapterError, match="retention_coef must be"):
        QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, retention_coef=-1.0)
    with pytest.raises(QAdapterError, match="two tokens or more"):
        RetentionStates(build_model(), build_tokenizer(), ["w1", ""])
    with pytest.raises(QAdapterError, match="row 1 is int"):
        as_texts(["w1 w2", 3])
