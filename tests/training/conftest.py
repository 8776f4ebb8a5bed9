"""Trainers on a tiny model, a word-level tokenizer and learnable pairs."""

from __future__ import annotations

import pytest
from training_tiny import build_model, build_pairs, build_tokenizer

from qadapter.training import QAdapterConfig, QAdapterTrainer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    """A trainer on tiny everything; keyword arguments go to QAdapterConfig."""

    def make(model=None, train=None, evaluation=None, callbacks=None, optimizers=(None, None),
             compute_metrics=None, say=None, retention_dataset=None, **arguments):
        settings = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4, "learning_rate": 1e-2, "seed": 0,
            "retention_coef": 0.0,
        }
        return QAdapterTrainer(
            model or build_model(), QAdapterConfig(**{**settings, **arguments}),
            train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer,
            callbacks=callbacks, optimizers=optimizers, compute_metrics=compute_metrics, say=say,
            retention_dataset=retention_dataset,
        )

    return make


@pytest.fixture
def model():
    return build_model()


@pytest.fixture(scope="session")
def pairs():
    return build_pairs(22)
