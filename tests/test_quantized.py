"""A base in 8 or 4 bits: its two streams, training, folders and exports, on the CPU.

Two peculiarities of bitsandbytes are switched off. In 8 bits it keeps columns with outliers in 16
bits and looks for them in the whole batch, so that a row depends on the others. In 4 bits it packs
weights for the CPU's bfloat16 instructions at the first inference, and packed ones give no
gradients; without that it computes as on a GPU.
"""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from data.tiny import chatml
from tiny_models import preference_rows, tiny_base, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qadapter import (
    AdapterConfig,
    ObjectiveConfig,
    QAdapterConfig,
    QAdapterError,
    QAdapterModel,
    QAdapterTrainer,
)

bitsandbytes = pytest.importorskip("bitsandbytes")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of every cast to float16

IDS = torch.tensor([[5, 9, 11, 3, 20, 7], [17, 4, 8, 30, 31, 5]])
SIZES = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
BITS = {
    8: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_base(**SIZES).save_pretrained(path)
    return path


def quantized(folder, bits):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BITS[bits]).eval()
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return base


def lora(folder, bits, objective=None):
    model = QAdapterModel.from_base(quantized(folder, bits), LORA, objective)
    torch.manual_seed(1)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("bits", BITS)
def test_streams_are_those_of_the_quantized_model(folder, bits):
    model = lora(folder, bits, ObjectiveConfig.authors())
    stock = quantized(folder, bits)
    base_hidden = stock.model(IDS).last_hidden_state
    assert not torch.equal(base_hidden, tiny_base(**SIZES).model(IDS).last_hidden_state)
    theirs = peft.get_peft_model(stock, LORA).eval()
    peft.set_peft_model_state_dict(theirs, model.adapter.state_dict())
    adapter_hidden = theirs.base_model.model.model(IDS).last_hidden_state
    with torch.no_grad():
        streams = model._run((0, -1), input_ids=IDS, use_cache=False)
        alone = model.hidden_streams(IDS)
    for h_a, h_b in (streams.last_hidden_state.chunk(2), alone):
        torch.testing.assert_close(h_a, adapter_hidden, atol=1e-4, rtol=0)
        torch.testing.assert_close(h_b, base_hidden, atol=1e-4, rtol=0)
    assert (h_a - h_b).abs().max() > 0.1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("adapter", [LORA, AdapterConfig(rank=4)], ids=["lora", "head"])
def test_training_on_it(tmp_path, bits, adapter):
    tiny_llama(**SIZES).save_pretrained(tmp_path / "base")
    model = QAdapterModel.from_base(quantized(tmp_path / "base", bits), adapter)
    frozen = model.base.model.layers[0].mlp.gate_proj.weight
    before = frozen.clone()
    trainer = QAdapterTrainer(
        model, QAdapterConfig(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, learning_rate=1e-2,
            max_steps=6, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
            warmup_steps=0, retention_coef=0.0,
        ),
        train_dataset=preference_rows(8), processing_class=chatml(),
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(frozen, before)
    # The adapter belongs to the checkpoint, in whatever precision it is loaded.
    expected = trainer.model.eval()(IDS).logits
    for base, same in ((quantized(tmp_path / "base", bits), True), (tmp_path / "base", False)):
        loaded = QAdapterModel.from_pretrained(tmp_path / "run", base).eval()
        assert torch.equal(loaded(IDS).logits, expected) == same


def test_bases_are_quantized_by_name(folder):
    model = QAdapterModel.from_base(folder, AdapterConfig(rank=2), quantization_config=BITS[8])
    assert model.base.is_quantized
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, strength=0.5).shape == (2, 9)


@pytest.mark.parametrize("bits", BITS)
def test_merging_into_it_is_refused(folder, tmp_path, bits):
    model = lora(folder, bits)
    with pytest.raises(QAdapterError, match="quantized"):
        model.merge_adapter()
    with pytest.raises(QAdapterError, match="quantized"):
        model.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", BITS)
def test_its_norms_tell_it_from_another_base(folder, tmp_path, bits):
    model = QAdapterModel.from_base(tiny_base(**SIZES), AdapterConfig(rank=2))
    model.save_pretrained(tmp_path / "a")
    QAdapterModel.from_pretrained(tmp_path / "a", quantized(folder, bits))
    other = tiny_base(**SIZES)
    with torch.no_grad():
        other.model.layers[1].input_layernorm.weight[3] += 0.25
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(QAdapterError, match="trunk's weights differ"):
        QAdapterModel.from_pretrained(tmp_path / "a", quantized(tmp_path / "other", bits))
    lora(folder, bits).save_pretrained(tmp_path / "b")
    QAdapterModel.from_pretrained(tmp_path / "b", quantized(folder, bits))
    with pytest.raises(QAdapterError, match="trunk's weights differ"):
        QAdapterModel.from_pretrained(tmp_path / "b", quantized(tmp_path / "other", bits))
