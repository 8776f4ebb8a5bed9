"""Fact 1 against a peer: in the policy parametrization with α₀ = α̃ = β, γ = 1 and no χ² term, our
trainer is TRL's DPOTrainer (sigmoid loss) on the same LoRA, step by step.

A float64 model, the same order of pairs, the same optimizer. TRL sums its log-probabilities in
float32, where numbers of the size seen here (up to 128) are multiples of 2^-17 = 8e-6: that is
how far rewards may be off. Gradients differ by some 2^-23 of their size (4e-7 seen), and Adam turns
that into at most learning rate (5e-3) × relative difference a step: six steps leave weights of
order 1e-2 within 1e-6 (2e-8 seen). Any other loss, or bfloat16 (TRL's default), is off by 1e-3 in
the first gradient.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from data.tiny import chatml
from datasets import Dataset
from tiny_models import preference_rows, tiny_llama

from qadapter import QAdapterConfig, QAdapterTrainer

trl = pytest.importorskip("trl")

BETA = 0.3
COMMON = {
    "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 5e-3,
    "lr_scheduler_type": "linear", "warmup_steps": 2, "logging_steps": 1, "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_length": 128,
    "train_sampling_strategy": "sequential", "max_grad_norm": 1.0, "seed": 1,
    "gradient_accumulation_steps": 2, "bf16": False,
}
METRICS = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")


def adapted_pair(folder, bootstrap):
    """Both trainers on copies of one base, with the same LoRA weights."""
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8, task_type="CAUSAL_LM"
    )
    base, rows = tiny_llama().double(), Dataset.from_list(preference_rows(24))
    theirs = trl.DPOTrainer(
        peft.get_peft_model(copy.deepcopy(base), lora),
        args=trl.DPOConfig(
            output_dir=str(folder / "trl"), beta=BETA, loss_type=["sigmoid"], **COMMON
        ),
        train_dataset=rows, processing_class=chatml(),
    )
    ours = QAdapterTrainer(
        copy.deepcopy(base),
        QAdapterConfig(
            output_dir=str(folder / "ours"), alpha_0=BETA, alpha_tilde=BETA, gamma=1.0,
            chi2_coef=0.0, bootstrap=bootstrap, retention_coef=0.0, **COMMON,
        ),
        # The tokens are TRL's: its chat template keeps the line break after an answer's end.
        train_dataset=theirs.train_dataset.select_columns(
            ["prompt_ids", "chosen_ids", "rejected_ids"]
        ),
        processing_class=chatml(), peft_config=lora,
    )
    ours.model.adapter.load_state_dict(peft.get_peft_model_state_dict(theirs.model))
    return ours, theirs


@pytest.mark.parametrize("bootstrap", ["next", "current"])
def test_dpo_step_by_step(tmp_path, bootstrap):
    """Under "next" both rewards of a pair are larger by V of the prompt (fact 2): only their
    difference is DPO's."""
    ours, theirs = adapted_pair(tmp_path, bootstrap)
    names = METRICS + (("rewards/chosen", "rewards/rejected") if bootstrap == "current" else ())
    ours.train()
    theirs.train()
    logs = [
        [log for log in trainer.state.log_history if "rewards/margins" in log]
        for trainer in (ours, theirs)
    ]
    assert len(logs[0]) == COMMON["max_steps"]
    for step, (mine, other) in enumerate(zip(*logs, strict=True)):
        for name in names:
            assert mine[name] == pytest.approx(other[name], rel=1e-6, abs=1e-5), (step, name)
    assert logs[0][0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert logs[0][-1]["loss"] < 0.6
    weights = peft.get_peft_model_state_dict(theirs.model)
    for name, parameter in ours.model.adapter.state_dict().items():
        torch.testing.assert_close(parameter, weights[name], atol=1e-6, rtol=0)
