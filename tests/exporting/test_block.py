"""Exports of adapters that read before the final norm: one decoder layer more, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_base
from torch import nn
from transformers import AutoModelForCausalLM

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.exporting import stock, verification
from qadapter.exporting.export import export

IDS = torch.tensor([[5, 9, 11, 3, 20, 7, 33, 2, 90]])
EXACT = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "mistral": {"sliding_window": 8},
    "phi3": {}, "olmo": {}, "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 4.0},
}
"""Biases, norms of queries and keys, windows, fused projections, a norm without weights, types of
each layer, scales."""
REFUSED = {
    "gemma": ({"head_dim": 8}, "another activation"), "gemma3_text": (
        {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}, "other norms"
    ), "cohere": ({}, "no norm between"), "olmo2": ({}, "other norms"),
    "phi": ({}, "no norm between"), "mixtral": ({}, "no gated MLP"),
    "qwen3_moe": ({}, "no gated MLP"),
}


@pytest.fixture
def here(monkeypatch):
    """The stock side of the check in this process: starting another takes seconds."""
    monkeypatch.setattr(
        verification, "ask_stock", lambda request, scratch: stock.answer(request)
    )


def block_model(architecture="llama", dtype=torch.float32, rank=4, objective=None, **changes):
    base = tiny_base(architecture, **changes).to(dtype)
    model = QAdapterModel.from_base(base, AdapterConfig(form="block", rank=rank), objective).eval()
    torch.manual_seed(1)
    nn.init.normal_(model.adapter.up.weight, std=0.5)
    return model


@pytest.mark.parametrize("architecture", EXACT)
def test_a_layer_more_is_the_adapter(architecture, here, tmp_path):
    model = block_model(architecture, **EXACT[architecture])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = export(model, tmp_path / "out")
    stock_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    depth = model.config.num_hidden_layers
    assert stock_model.config.num_hidden_layers == depth + 1
    with torch.no_grad():
        found, expected = stock_model(IDS).logits, model(IDS).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (expected - model.base(IDS).logits).abs().max() > 0.01 * expected.abs().max()
    assert report.check.same_answers == report.check.prompts
    assert model.base.config.num_hidden_layers == depth
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("architecture", REFUSED)
def test_layers_that_cannot_be_it_are_refused(architecture, tmp_path):
    changes, reason = REFUSED[architecture]
    model = block_model(architecture, **changes)
    message = f"no decoder layer of .*{reason}.*--approximate --texts_file"
    with pytest.raises(QAdapterError, match=message) as seen:
        export(model, tmp_path / "out")
    assert "\n" not in str(seen.value) and not (tmp_path / "out").exists()


def test_16_bits(here, tmp_path):
    model = block_model("llama", torch.bfloat16)
    check = export(model, tmp_path / "out").check
    assert check.dtype == "bfloat16" and 0 < check.error_to_tolerance < 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3


def test_other_temperatures_scale_the_head(here, tmp_path):
    """p_b = 0 and p_a = 2: a head of its own, where it was tied."""
    model = block_model("llama", objective=ObjectiveConfig(alpha_0=0.5, alpha_tilde=0.5))
    model.set_policy(alpha_tilde=0.25)
    assert model.policy.stream_weights() == (2.0, 0.0)
    export(model, tmp_path / "out")
    stock_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(stock_model(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_no_checkpoint_is_is_refused(tmp_path):
    model = block_model()
    model.set_policy(strength=0.5)
    with pytest.raises(QAdapterError, match=r"two streams behind the final norm.*strength 1"):
        export(model, tmp_path / "out")
    model.set_policy()
    with pytest.raises(QAdapterError, match='is no LoRA: form="merged"'):
        export(model, tmp_path / "out", "lm_head_lora")
    with pytest.raises(QAdapterError, match="rank is 49, their MLPs are 48 wide"):
        export(block_model(rank=49), tmp_path / "out")
    authors = block_model(objective=ObjectiveConfig.authors())
    with pytest.raises(QAdapterError, match="policy parametrization"):
        export(authors, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 1.1])
def test_a_layer_that_is_off_is_not_kept(factor, dtype, here, tmp_path, monkeypatch):
    """The whole export is held against the policy, too, and rounding is no excuse."""
    from qadapter.exporting import block

    def wrong(layer, adapter, config, fill=block._fill):
        fill(layer, adapter, config)
        if layer.mlp.down_proj.weight.dtype == torch.float32:  # not the one that is checked
            with torch.no_grad():
                layer.mlp.down_proj.weight.mul_(factor)

    monkeypatch.setattr(block, "_fill", wrong)
    with pytest.raises(QAdapterError, match="checked and is not kept"):
        export(block_model(dtype=dtype), tmp_path / "out")


def test_a_trunk_that_is_another_is_not_kept(here, tmp_path, monkeypatch):
    from qadapter.exporting import block

    def other(model, merged=block.merged_block):
        shell = merged(model)
        scaled = 1.01 * shell.model.layers[0].mlp.down_proj.weight
        shell.model.layers[0].mlp.down_proj.weight = nn.Parameter(scaled, requires_grad=False)
        return shell

    monkeypatch.setattr(block, "merged_block", other)
    with pytest.raises(QAdapterError, match="hidden states differ from the base's"):
        export(block_model(), tmp_path / "out")


@pytest.mark.parametrize("form", ["merged", "lm_head_lora"])
def test_its_nearest_linear_adapter(form, here, tmp_path):
    """At any strength, and on bases whose layers can't be it."""
    model = block_model("gemma", head_dim=8)
    model.set_policy(strength=0.5)
    texts = torch.randint(1, 96, (12, 40), generator=torch.Generator().manual_seed(0)).tolist()
    found = export(model, tmp_path / "out", form, approximate=True, texts=texts).approximation
    assert 0 < found.kl_policy_export < found.kl_policy_base
