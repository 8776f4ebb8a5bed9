"""The plug-in for vLLM with a stand-in for what it uses of it; tests/engines asks vLLM itself."""

from __future__ import annotations

import sys
import types

import peft
import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.integrations import vllm_plugin

IDS = torch.tensor([[5, 9, 11, 3, 20, 7]])


class RMSNorm(nn.Module):
    """vLLM's: with a residual it is added first, and comes back as the second of two."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, states, residual=None):
        if residual is None:
            return self.own(states)
        return self.own(states + residual), states + residual


class LlamaForCausalLM(nn.Module):
    """A transformers model in the shape of vLLM's classes."""

    base: nn.Module

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.lm_head = vllm_config.base.lm_head
        self.model = nn.Module()
        self.model.layers = vllm_config.base.model
        self.model.norm = RMSNorm(vllm_config.base.model.norm)
        self.before = vllm_config.before

    def forward(self, input_ids):
        states = self.before(input_ids)
        hidden, _ = self.model.norm(states / 4, states * 3 / 4)
        return hidden

    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states)

    def load_weights(self, weights):
        return set(weights)


@pytest.fixture
def vllm(monkeypatch):
    """Modules of that name; the registry of the stand-in."""
    registered = types.SimpleNamespace(load_model_cls=lambda: LlamaForCausalLM)
    registry = types.SimpleNamespace(models={"LlamaForCausalLM": registered, "ByName": registered})
    registry.get_supported_archs = lambda: registry.models.keys()
    registry.register_model = registry.models.__setitem__
    contents = {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor": {}, "vllm.model_executor.models": {},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": {"ByName": None}},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.layernorm": {"RMSNorm": RMSNorm},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return registry


def policy(form="mlp", objective=None, base=None):
    model = QAdapterModel.from_base(
        base or tiny_llama(), AdapterConfig(form=form, rank=4), objective
    ).eval()
    nn.init.normal_(model.adapter.up.weight, std=0.5)
    return model


def served(model, folder, base=None, architecture="LlamaForCausalLM", **overrides):
    """vLLM's model of the base with ``--hf-overrides``, after its weights were loaded."""
    model.save_pretrained(folder)
    base = base or model.base
    config = base.config.__class__.from_dict(base.config.to_dict())
    config.architectures = [f"QAdapter{architecture}"]
    for name, value in {"qadapter": str(folder), **overrides}.items():
        setattr(config, name, value)

    def before(ids):
        found = []
        hook = base.model.norm.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        base.model(input_ids=ids)
        hook.remove()
        return found[0]

    given = types.SimpleNamespace(
        model_config=types.SimpleNamespace(hf_config=config), base=base, before=before
    )
    made = getattr(vllm_plugin, f"QAdapter{architecture}")(vllm_config=given)
    assert made.load_weights(["a"]) >= {"a", "qadapter.up.weight"}
    return made


def test_every_architecture_has_a_second_one(vllm):
    vllm_plugin.register()
    vllm_plugin.register()
    assert set(vllm.models) == {"LlamaForCausalLM", "ByName", "QAdapterLlamaForCausalLM",
                                "QAdapterByName"}
    module, _, name = vllm.models["QAdapterLlamaForCausalLM"].partition(":")
    assert issubclass(getattr(sys.modules[module], name), LlamaForCausalLM)


@pytest.mark.parametrize("form", ["linear", "block", "mlp"])
@pytest.mark.parametrize("strength", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("objective", [
    None, ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.7, parametrization="q"),
], ids=["policy", "q"])
@torch.no_grad()
def test_the_policys_logits(vllm, tmp_path, form, strength, objective):
    model = policy(form, objective)
    model.set_policy(strength=strength)
    expected = model(input_ids=IDS).logits.log_softmax(-1)
    theirs = served(model, tmp_path / "mine", qadapter_strength=strength)
    found = theirs.compute_logits(theirs(IDS)).log_softmax(-1)
    assert (found - expected).abs().max() < 1e-5
    assert (model(input_ids=IDS, strength=0.0).logits.log_softmax(-1) - found).abs().max() > 1e-2


def refused(*args, **kwargs) -> str:
    with pytest.raises(QAdapterError) as caught:
        served(*args, **kwargs)
    return str(caught.value)


def test_what_is_refused(vllm, tmp_path):
    model = policy()
    assert "name the adapter" in refused(model, tmp_path / "a", qadapter=None)
    assert "sets ByName up" in refused(model, tmp_path / "a", architecture="ByName")
    for strength in (-1, "much"):
        assert "qadapter_strength" in refused(model, tmp_path / "a", qadapter_strength=strength)
    other = tiny_llama(seed=5)
    assert "head" in refused(model, tmp_path / "a", base=other)
    lora = QAdapterModel.from_base(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert "--form peft" in refused(lora, tmp_path / "lora")


def test_a_final_norm_elsewhere_is_refused(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys.modules["vllm.model_executor.layers.layernorm"], "RMSNorm", type("Other", (), {})
    )
    assert "before the final norm" in refused(policy("block"), tmp_path / "a")
