"""LoRA in the trunk: its configurations, its two streams in training, and what is refused."""

from __future__ import annotations

import copy
import logging
import warnings

import peft
import pytest
import torch
from data.tiny import chatml
from tiny_models import preference_rows, tiny_base, tiny_llama, tokenized
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from qadapter import (
    AdapterConfig,
    ObjectiveConfig,
    QAdapterConfig,
    QAdapterError,
    QAdapterModel,
    QAdapterTrainer,
    q_adapter_loss,
)
from qadapter.adapters.streams import BASE
from qadapter.data import PreferenceCollator
from qadapter.training.losses import batch_loss

IDS = torch.tensor([[5, 9, 11, 3, 20, 7]])
QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "lora": peft.LoraConfig(**QV, lora_dropout=0.3),
    "dora": peft.LoraConfig(**QV, use_dora=True),
    "rslora and patterns": peft.LoraConfig(
        r=4, target_modules=r".*layers\.[01]\..*(q_proj|down_proj)", use_rslora=True,
        rank_pattern={"down_proj": 2}, layers_to_transform=None,
    ),
    "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
}


def model_of(config=CONFIGS["lora"], objective=None, base=None, trained=True) -> QAdapterModel:
    model = QAdapterModel.from_base(base or tiny_llama(), config, objective)
    if trained:
        torch.manual_seed(1)
        for parameter in model.adapter.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(pairs: int = 4) -> dict:
    return PreferenceCollator(pad_token_id=2)(list(tokenized(pairs)))


def arguments(folder, **changes) -> QAdapterConfig:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "max_steps": 6, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        "warmup_steps": 0, "use_cpu": True, "retention_coef": 0.0,
    }
    return QAdapterConfig(**settings | changes)


def losses(trainer: QAdapterTrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# --- the two streams ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_base_stream_is_the_base_bit_for_bit(name):
    model = model_of(CONFIGS[name]).eval()
    h_a, h_b = model.hidden_streams(IDS)
    assert torch.equal(h_b, tiny_llama().model(IDS).last_hidden_state)
    assert (h_a - h_b).abs().max() > 1e-3
    assert h_a.requires_grad and not h_b.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_an_untrained_adapter_is_the_base(name):
    """Fact 3. DoRA divides by a norm and multiplies by it; others have zeros of their own."""
    model = model_of(CONFIGS[name], trained=False).eval()
    h_a, h_b = model.hidden_streams(IDS)
    torch.testing.assert_close(h_a, h_b, atol=1e-5, rtol=1e-5)


def test_the_preset_of_the_paper():
    model = QAdapterModel.from_base(tiny_llama(), "paper")
    config = model.adapter_config
    assert (config.r, set(config.target_modules)) == (8, {"q_proj", "v_proj"})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        8 * (32 + out) for out in (32, 16)
    ) * 2
    with pytest.raises(QAdapterError, match="neither a preset"):
        QAdapterModel.from_base(tiny_llama(), "papr")


def test_gating_changes_no_requires_grad_and_survives_errors():
    model = model_of()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), model.adapter.off():
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), model.adapter.on((0, BASE), 2, 6):
        _ = 1 / 0
    model.hidden_streams(IDS)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not torch.equal(*model.eval().hidden_streams(IDS))


def test_dropout_is_the_adapters_alone():
    """In training it moves the adapted stream and never the base's; in evaluation nothing."""
    base = tiny_llama(attention_dropout=0.9)
    model = model_of(base=base).train()
    first, second = (model.hidden_streams(IDS) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    modes = {type(m).__name__ for m in model.base.modules() if m.training}
    assert "LlamaAttention" not in modes and "Dropout" in modes
    first, second = (model.eval().hidden_streams(IDS) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_copy_has_its_own_gates(layers):
    model = model_of(peft.LoraConfig(**QV, lora_dropout=0.3, layers_to_transform=layers)).eval()
    assert (model.adapter.split is None) == (layers is None)
    other = copy.deepcopy(model)
    expected = model(IDS, strength=0.4).logits
    assert torch.equal(other(IDS, strength=0.4).logits, expected)
    with other.adapter.off():
        assert torch.equal(model(IDS, strength=0.4).logits, expected)
    with torch.no_grad():
        for parameter in other.adapter.parameters():
            parameter.zero_()
    assert torch.equal(model(IDS, strength=0.4).logits, expected)
    assert not torch.equal(other(IDS, strength=0.4).logits, expected)


def test_sixteen_bit_base_trains_its_adapter_in_float32():
    model = model_of(base=tiny_llama().to(torch.bfloat16), trained=False)
    assert {p.dtype for p in model.adapter.parameters()} == {torch.float32}
    h_a, h_b = model.hidden_streams(IDS)
    assert h_a.dtype == h_b.dtype == torch.bfloat16
    out = model.eval()(IDS, strength=0.5)
    assert out.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_merged_and_put_back_bit_for_bit(name):
    model = model_of(CONFIGS[name]).eval()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    logits, dialled = model(IDS).logits, model(IDS, strength=0.5).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, logits, atol=1e-4, rtol=1e-4)
    for blocked in (lambda: model(IDS, strength=0.5), lambda: model(IDS, strength=0.0),
                    model.train, model.merge_adapter):
        with pytest.raises(QAdapterError, match=r"unmerge_adapter\(\) first"):
            blocked()
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(x, after[n]) for n, x in before.items())
    assert torch.equal(model(IDS, strength=0.5).logits, dialled)
    with pytest.raises(QAdapterError, match="not merged"):
        model.unmerge_adapter()
    with pytest.raises(QAdapterError, match="in the trunk can be merged"):
        QAdapterModel.from_base(tiny_base(), AdapterConfig(rank=2)).merge_adapter()


# --- training -------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_the_logits():
    """The hidden-level loss without logits, against two whole logit tensors."""
    objective = ObjectiveConfig(alpha_0=0.3, gamma=0.9)
    model, inputs = model_of(objective=objective).eval(), batch()
    loss = batch_loss(model, inputs).loss
    loss.backward()
    ours = [p.grad.clone() for p in model.adapter.parameters()]
    model.zero_grad()
    h_a, h_b = model.hidden_streams(inputs["input_ids"], inputs["attention_mask"])
    weight = model.head.weight
    expected = q_adapter_loss(
        h_a @ weight.T, h_b @ weight.T, inputs["input_ids"], inputs["completion_mask"], objective
    ).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for mine, parameter in zip(ours, model.adapter.parameters(), strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(
            mine, parameter.grad, atol=1e-4 * parameter.grad.abs().max().item(), rtol=1e-3
        )


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_training_lowers_the_loss_and_leaves_the_base(tmp_path, name):
    base = tiny_llama()
    before = {n: p.clone() for n, p in base.named_parameters()}
    trainer = QAdapterTrainer(
        base, arguments(tmp_path), train_dataset=preference_rows(8), processing_class=chatml(),
        peft_config=CONFIGS[name],
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    ids = trainer.model.get_input_embeddings().weight
    assert torch.equal(ids, before["model.embed_tokens.weight"])
    for n, p in trainer.model.base.named_parameters():
        plain = n.replace(".base_layer", "")
        assert plain not in before or torch.equal(p, before[plain]), n
    loaded = QAdapterModel.from_pretrained(tmp_path, tiny_llama()).eval()
    trained = trainer.model.eval()
    assert torch.equal(loaded(IDS, strength=0.7).logits, trained(IDS, strength=0.7).logits)
    assert "target_modules" in (tmp_path / "README.md").read_text()


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer = QAdapterTrainer(
            tiny_llama(), arguments(tmp_path, gradient_checkpointing=checkpointing, max_steps=3,
                                    save_strategy="no"),
            train_dataset=preference_rows(8), processing_class=chatml(),
            peft_config=CONFIGS["lora"],
        )
        trainer.read_base()
        recomputed = []
        trainer.model.base.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, seen=recomputed: seen.append(torch.is_grad_enabled())
        )
        trainer.train()
        results.append((losses(trainer), [p.clone() for p in trainer.model.adapter.parameters()]))
        # Each step: the adapted forward, and once more in the backward.
        assert recomputed == [True] * 3 * (2 if checkpointing else 1)
    (losses_a, weights_a), (losses_b, weights_b) = results
    assert losses_a == pytest.approx(losses_b, abs=1e-6)
    for a, b in zip(weights_a, weights_b, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_no_block_below_an_adapter_builds_a_graph(before, reentrant):
    """But for checkpoints that would give no gradients otherwise."""
    base = tiny_llama(num_hidden_layers=4)
    options = None if reentrant is None else {"use_reentrant": reentrant}
    if before:
        base.gradient_checkpointing_enable(options)
        base.disable_input_require_grads()  # PEFT asks for them again
    model = model_of(peft.LoraConfig(**QV, layers_to_transform=[2]), base=base).train()
    if not before:
        model.gradient_checkpointing_enable(options)
        model.train()
    graphs = []  # of what enters each block
    for block in base.model.layers:
        block.register_forward_pre_hook(lambda module, args: graphs.append(args[0].requires_grad))
    hidden = model.adapter_hidden(IDS)
    assert graphs == [bool(reentrant)] * 3 + [True]
    hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.adapter.parameters())


def test_checkpointed_layers_that_drop_activations_are_refused():
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
                  num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16)
    )
    model = QAdapterModel.from_base(opt, peft.LoraConfig(**QV))
    opt.model.decoder.layers[0].gradient_checkpointing = True  # its switch has had two names
    with pytest.raises(QAdapterError, match="drops activations"):
        model.train()


def test_resumed_training_is_the_same(tmp_path):
    def train(folder, **changes):
        trainer = QAdapterTrainer(
            tiny_llama(), arguments(folder, save_steps=2, max_steps=4, **changes),
            train_dataset=preference_rows(16), processing_class=chatml(),
            peft_config=peft.LoraConfig(**QV),
        )
        return trainer

    whole = train(tmp_path)
    whole.train()
    resumed = train(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(
        whole.model.adapter.parameters(), resumed.model.adapter.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    other = QAdapterTrainer(
        tiny_llama(), arguments(tmp_path), train_dataset=preference_rows(16),
        processing_class=chatml(), peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
    )
    with pytest.raises(QAdapterError, match="trained with"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_token_rewards_follow_both_streams():
    model, inputs = model_of(objective=ObjectiveConfig.authors()).eval(), batch(2)
    h_a, h_b = model.hidden_streams(inputs["input_ids"], inputs["attention_mask"])
    expected = q_adapter_loss(
        h_a @ model.head.weight.T, h_b @ model.head.weight.T, inputs["input_ids"],
        inputs["completion_mask"], model.objective,
    ).token_rewards
    rewards = model.token_rewards(
        inputs["input_ids"], inputs["completion_mask"], inputs["attention_mask"]
    )
    torch.testing.assert_close(rewards, expected.detach(), atol=1e-4, rtol=1e-4)


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        (peft.LoraConfig(r=4, target_modules=["lm_head"]), "lm_head: the two streams share"),
        (peft.LoraConfig(**QV, modules_to_save=["lm_head"]), "lm_head: the two streams share"),
        (peft.LoraConfig(r=4, target_modules=["nothing"]), "nothing"),
        (peft.LoraConfig(**QV, bias="all"), "bias='all'"),
        (peft.LoraConfig(**QV, init_lora_weights="pissa"), "changes the base's own weights"),
        (peft.LoraConfig(**QV, trainable_token_indices=[1]), "trainable_token_indices"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "AdaLoRA"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "adapts no layers"),
    ],
)
def test_configurations_that_move_the_base_are_refused(config, message):
    base = tiny_base()
    with pytest.raises(QAdapterError, match=message):
        QAdapterModel.from_base(base, config)
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in base.modules())


def test_adapted_bases_are_refused():
    base = tiny_base()
    adapted = peft.get_peft_model(base, peft.LoraConfig(**QV))
    with pytest.raises(QAdapterError, match="holds PEFT layers already"):
        QAdapterModel.from_base(base, peft.LoraConfig(**QV))
    with pytest.raises(QAdapterError, match="got PeftModel"):
        QAdapterModel.from_base(adapted, peft.LoraConfig(**QV))
    with pytest.raises(QAdapterError, match="holds PEFT layers already"):
        QAdapterModel.from_base(base, AdapterConfig(rank=2))


def test_a_second_adapter_is_refused(tmp_path):
    with pytest.raises(QAdapterError, match="has its adapter"):
        QAdapterTrainer(model_of(), arguments(tmp_path), peft_config=CONFIGS["lora"])


def test_nothing_is_logged_by_peft(caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of().eval()(IDS)
    assert not caplog.records


def test_a_lora_by_the_trainers_arguments(tmp_path):
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "adapter_kind": "lora"}
    config = QAdapterConfig(**arguments, lora_r=2, lora_target_modules=["q_proj"]).adapter_config()
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 16, {"q_proj"})
    with pytest.raises(QAdapterError, match=r"lora_dropout must be in \[0, 1\), got 1.0"):
        QAdapterConfig(**arguments, lora_dropout=1.0)
    with pytest.raises(QAdapterError, match="adapter_form is for adapter_kind head"):
        QAdapterConfig(**arguments, adapter_form="mlp")
