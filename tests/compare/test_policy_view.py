"""The policy as TRL sees it: the same numbers as TRL's own fused head, and DPO step by step."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from data.tiny import chatml
from tiny_models import tiny_llama, tokenized
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from qadapter import (
    AdapterConfig,
    ObjectiveConfig,
    QAdapterConfig,
    QAdapterError,
    QAdapterModel,
    QAdapterTrainer,
)
from qadapter.compare.policy_view import PolicyForCausalLM

BETA = 0.3
OBJECTIVE = ObjectiveConfig(alpha_0=BETA, alpha_tilde=BETA, chi2_coef=0.0)
ADAPTERS = {
    "head": AdapterConfig(form="mlp", rank=4),
    "block": AdapterConfig(form="block", rank=4),
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


def build(kind, moved=True):
    torch.manual_seed(0)
    model = QAdapterModel.from_base(tiny_llama(), copy.deepcopy(ADAPTERS[kind]), OBJECTIVE)
    if moved:
        for parameter in model.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch():
    ids = torch.arange(3, 27).view(2, 12) * 5 % 600
    labels = ids.clone()
    labels[:, :4] = -100
    return ids, labels


@pytest.mark.parametrize("kind", ADAPTERS)
def test_log_probabilities_are_those_of_trl_and_of_the_logits(kind):
    """Values and gradients; float32 sums in another order."""
    model, (ids, labels) = build(kind), batch()
    ours, theirs = PolicyForCausalLM(model), PolicyForCausalLM(model)
    add_fused_lm_head(theirs)
    found = ours(input_ids=ids, labels=labels, fused_lm_head=True)
    peer = theirs(input_ids=ids, labels=labels, fused_lm_head=True)
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
    torch.testing.assert_close(found.log_probs, peer.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_probs, logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, peer.loss)
    assert torch.equal(found.label_mask, peer.label_mask)
    parameters = list(model.adapter.parameters())
    for mine, other in zip(
        torch.autograd.grad(found.loss, parameters),
        torch.autograd.grad(peer.loss, parameters), strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reference_is_the_base_whatever_was_trained(kind):
    model, (ids, labels) = build(kind), batch()
    base = tiny_llama()
    reference = PolicyForCausalLM(model, reference=True)
    with torch.no_grad():
        found = reference(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        logps = base(input_ids=ids).logits[:, :-1].log_softmax(-1)
        torch.testing.assert_close(
            reference(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-5, atol=1e-5
        )
    expected = logps.gather(-1, ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_generates_what_the_model_does(kind):
    model, ids = build(kind), batch()[0]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(
        PolicyForCausalLM(model).eval().generate(ids, **options), model.generate(ids, **options)
    )


def test_a_stream_that_is_no_policy_is_refused():
    model = QAdapterModel.from_base(tiny_llama(), AdapterConfig(), ObjectiveConfig.authors())
    with pytest.raises(QAdapterError, match="parametrization"):
        PolicyForCausalLM(model)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_trl_trains_what_our_trainer_trains(tmp_path, kind):
    """DPO by TRL on the view, and by our trainer (cached features for the head): the same adapter
    after six steps. Adam turns float32 noise in tiny gradients into at most a learning rate (5e-3)
    a step; weights that moved by some 1e-2 agree to 1e-3."""
    common = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 5e-3, "seed": 1,
        "lr_scheduler_type": "linear", "warmup_steps": 2, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_length": 128,
        "train_sampling_strategy": "sequential",
    }
    pairs = tokenized(24)

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    theirs = build(kind, moved=False)
    view = PolicyForCausalLM(theirs)
    peer = Prepared(
        view, args=DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=BETA, precompute_ref_log_probs=True, bf16=False,
            gradient_checkpointing=False, **common,
        ),
        train_dataset=pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]),
        processing_class=chatml(),
    )
    del view.forward
    peer.train()
    ours = build(kind, moved=False)
    trainer = QAdapterTrainer(
        ours, QAdapterConfig(output_dir=str(tmp_path / "ours"), retention_coef=0.0, **common),
        train_dataset=pairs, processing_class=chatml(),
    )
    trainer.train()
    losses = [
        [log["loss"] for log in t.state.log_history if "grad_norm" in log] for t in (peer, trainer)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 2e-3
    start = build(kind, moved=False).adapter.parameters()
    for mine, other, before in zip(
        ours.adapter.parameters(), theirs.adapter.parameters(), start, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)
        assert (mine - before).abs().max() > 5e-3
