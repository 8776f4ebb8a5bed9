"""A trunk without its final norm, and the norm: together the whole, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_base
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

from qadapter import AdapterConfig, QAdapterError, QAdapterModel
from qadapter.trunk.caches import name_of_cache
from qadapter.trunk.final_norm import FinalNorm
from qadapter.trunk.lm_head import trunk

TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
BASES = {
    "llama": {}, "phi": {}, "gpt_neox": {}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 3}, "gemma3_text": {"head_dim": 8, **TYPES},
    "cohere": {}, "olmo": {}, "granite": {"embedding_multiplier": 3.0}, "mixtral": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
"""Norms with a bias, without weights, of one dtype alone; positions and scales on embeddings."""


def texts() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 96, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + 2
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", BASES)
def test_the_norm_of_what_enters_it_is_the_trunk_to_the_last_bit(architecture, dtype):
    base = tiny_base(architecture, **BASES[architecture]).to(dtype)
    found, inputs = FinalNorm.of(base), texts()
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        whole = trunk(base)(**inputs, use_cache=False).last_hidden_state
        states = found.before(**inputs, use_cache=False).last_hidden_state
        assert torch.equal(found(states)[seen], whole[seen])
        assert not torch.equal(states[seen], whole[seen])
        # In float32 it is what it would be there.
        wanted = copy.deepcopy(found.norm).float()(states.float())
        torch.testing.assert_close(found(states.float()), wanted, rtol=1e-6, atol=1e-6)


def test_it_decodes_with_the_caches_of_the_whole():
    base = tiny_base("mistral", sliding_window=4)
    found, ids, name = FinalNorm.of(base), texts()["input_ids"][:1], name_of_cache(trunk(base))
    steps = {}
    for part in (trunk(base), found.before):
        cache, states = DynamicCache(config=base.config), []
        for piece in ids.split((6, 1, 5, 2), dim=1):
            out = part(input_ids=piece, use_cache=True, **{name: cache})
            states.append(out.last_hidden_state)
        steps[part] = torch.cat(states, 1).detach()
    whole, before = steps.values()
    assert torch.equal(found(before), whole)


def test_the_base_stays_as_it_was_and_is_followed_where_it_goes():
    base = tiny_base()
    before = [p.clone() for p in base.parameters()]
    ids = texts()["input_ids"]
    expected = base(input_ids=ids).logits
    found = FinalNorm.of(base)
    assert torch.equal(base(input_ids=ids).logits, expected)
    assert all(map(torch.equal, before, base.parameters()))
    with torch.no_grad():
        found.norm.weight.mul_(2)
        base.to(torch.float64)
    states = found.before(input_ids=ids).last_hidden_state
    assert states.dtype == torch.float64
    assert torch.equal(found(states), trunk(base)(input_ids=ids).last_hidden_state)


def test_gradients_reach_the_states_alone():
    base = tiny_base().requires_grad_(False).bfloat16()
    states = torch.randn(2, 32, requires_grad=True)
    FinalNorm.of(base)(states).square().sum().backward()
    assert states.grad.abs().min() > 0


def test_its_size_is_a_power_of_two():
    base = tiny_base()
    first = FinalNorm.of(base).shrinks_by
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_(8)
    assert FinalNorm.of(base).shrinks_by == 8 * first


def test_trunks_that_end_otherwise_are_refused():
    projected = OPTForCausalLM(OPTConfig(
        vocab_size=96, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=48,
        num_attention_heads=4, max_position_embeddings=64, do_layer_norm_before=True,
    )).eval()
    with pytest.raises(QAdapterError, match=r"final norm of OPTForCausalLM.*\"linear\" or \"mlp\""):
        QAdapterModel.from_base(projected, AdapterConfig(form="block"))
    assert QAdapterModel.from_base(projected, AdapterConfig(form="linear"))
    replaced = tiny_base()
    replaced.model.forward = replaced.model.forward
    with pytest.raises(QAdapterError, match="forward of LlamaModel was replaced") as seen:
        FinalNorm.of(replaced)
    assert "\n" not in str(seen.value)


def test_a_trunk_with_a_state_has_one_too():
    base = MambaForCausalLM(MambaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, use_mambapy=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )).eval()
    ids = texts()["input_ids"]
    found = FinalNorm.of(base)
    with torch.no_grad():
        whole = trunk(base)(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(found(found.before(input_ids=ids, use_cache=False)[0]), whole)
