"""A trunk in two parts is the whole bit for bit, made of the very same modules, or refused."""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from second_device import SECOND, SecondDevice
from tiny_models import tiny_base
from torch import nn

from qadapter import QAdapterError
from qadapter.adapters.lora import LoraAdapter
from qadapter.trunk.lm_head import trunk
from qadapter.trunk.split import SplitTrunk, lowest_adapted

DEPTH = 4
EXACT = {
    "llama": {}, "qwen3": {}, "mistral": {"sliding_window": 3}, "phi": {}, "mixtral": {},
    "qwen3_moe": {}, "gpt_neox": {}, "gemma": {"head_dim": 8}, "gemma2": {"sliding_window": 3},
    "gemma3_text": {
        "head_dim": 8, "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "cohere2": {"sliding_window": 3}, "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
}
"""Windows, types of each block, blocks without positions, experts, scaled embeddings, a hybrid."""
REFUSED = {
    "gpt2": ({"n_layer": DEPTH, "n_embd": 32, "n_head": 4}, "GPT2LMHeadModel.*adds to them"),
    "granite": ({"embedding_multiplier": 3.0}, "GraniteForCausalLM.*scales embeddings"),
    "gemma3n_text": (
        {"head_dim": 8, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
         "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4},
        "Gemma3nForCausalLM can't be run in two parts at block 2",
    ),
}
"""Positions added to embeddings; embeddings scaled in the forward; embeddings for later blocks."""


def deep_base(architecture: str = "llama", **changes):
    return tiny_base(architecture, num_hidden_layers=DEPTH, **changes)


def texts() -> dict[str, torch.Tensor]:
    """Of like length, one padded on the left; positions begin at 2."""
    ids = torch.randint(1, 96, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + 2
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def through(split: SplitTrunk, **inputs) -> torch.Tensor:
    states = split.below(**inputs, use_cache=False).last_hidden_state
    inputs.pop("input_ids")
    return split.above(inputs_embeds=states, **inputs, use_cache=False).last_hidden_state


def assert_whole(base, split: SplitTrunk, **inputs) -> None:
    inputs = inputs or texts()
    whole = trunk(base)(**inputs, use_cache=False).last_hidden_state
    seen = inputs.get("attention_mask", torch.ones(whole.shape[:2])).bool()
    assert torch.equal(through(split, **inputs)[seen], whole[seen])


def with_lora(base, **options) -> LoraAdapter:
    """Of numbers that do something."""
    adapter = LoraAdapter(base, peft.LoraConfig(r=2, **options))
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    adapter.train(False)
    return adapter


# --- the two are the whole ------------------------------------------------------------------


@pytest.mark.parametrize("architecture", EXACT)
def test_parts_are_the_whole_bit_for_bit(architecture):
    base = deep_base(architecture, **EXACT[architecture])
    for first_block in range(1, DEPTH):
        split = SplitTrunk.of(base, first_block)
        assert split.first_block == first_block
        assert_whole(base, split)
        assert_whole(base, split, input_ids=texts()["input_ids"])
    states = trunk(base)(**texts(), use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(split.below(**texts(), use_cache=False).last_hidden_state, states[-2])


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason(architecture):
    changes, message = REFUSED[architecture]
    with pytest.raises(QAdapterError, match=message):
        SplitTrunk.of(deep_base(architecture, **changes), 2)


@pytest.mark.parametrize("first_block", [-1, 0, DEPTH])
def test_a_part_without_blocks_is_refused(first_block):
    with pytest.raises(QAdapterError, match=f"at block 1 to 3, not at {first_block}"):
        SplitTrunk.of(deep_base(), first_block)


def test_windows_longer_than_a_probe_are_seen():
    """Types of blocks that are not kept in a list can't be cut: block 1 would be taken for 0."""
    base = deep_base("gemma2", sliding_window=64)
    vars(base.config)["layer_types"] = dict(enumerate(base.config.layer_types))
    with pytest.raises(QAdapterError, match="other states than the whole"):
        SplitTrunk.of(base, 1)
    SplitTrunk.of(base, 2)  # the same types again
    assert base.config.sliding_window == 64


def test_a_forward_that_was_replaced_is_refused():
    base = deep_base()
    base.model.forward = base.model.forward
    with pytest.raises(QAdapterError, match="forward of LlamaModel was replaced"):
        SplitTrunk.of(base, 2)


def test_a_base_that_accelerate_placed_is_split_by_its_blocks_hooks():
    """Its forwards are replaced on purpose: inputs are brought to where each module is."""
    base = deep_base()
    plain = trunk(base)(**texts(), use_cache=False).last_hidden_state
    hooked = accelerate.dispatch_model(base, {"": "cpu"}, force_hooks=True)
    split = SplitTrunk.of(hooked, 2)
    assert torch.equal(through(split, **texts())[0], plain[0])
    accelerate.hooks.remove_hook_from_submodules(base)
    parts = [base.model.embed_tokens, *base.model.layers, base.model.norm, base.model]
    with SecondDevice():
        for part, device in zip(parts, ["cpu"] * 3 + [SECOND] * 3 + ["cpu"], strict=True):
            if part is not base.model:
                part.to(device)
            add_hook_to_module(part, AlignDevicesHook(device, io_same_device=part is base.model))
        assert trunk(base)(**texts(), use_cache=False).last_hidden_state.device.type == "cpu"
        ours = through(SplitTrunk.of(base, 2), **texts())
        torch.testing.assert_close(ours.cpu()[0], plain[0], atol=1e-5, rtol=1e-5)


def test_lists_of_blocks_are_told_by_their_length():
    base = deep_base("mixtral", num_local_experts=DEPTH)  # lists of experts are inside of blocks
    assert_whole(base, SplitTrunk.of(base, 2))
    base.model.others = nn.ModuleList(nn.Identity() for _ in range(DEPTH))
    with pytest.raises(QAdapterError, match="has 2 lists of 4 blocks"):
        SplitTrunk.of(base, 2)
    assert lowest_adapted(base) is None


# --- of the same modules --------------------------------------------------------------------


def test_nothing_is_copied():
    base = deep_base()
    before = set(base.modules()), {n: id(p) for n, p in base.named_parameters()}
    split = SplitTrunk.of(base, 1)
    blocks = list(base.model.layers)
    assert list(split.below.layers) == blocks[:1] and list(split.above.layers) == blocks[1:]
    assert split.above.norm is base.model.norm and split.below.norm is not base.model.norm
    assert split.below.embed_tokens is base.model.embed_tokens
    assert (set(base.modules()), {n: id(p) for n, p in base.named_parameters()}) == before
    assert base.config.num_hidden_layers == DEPTH


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_parts_follow_the_base(architecture):
    base = deep_base(architecture, **EXACT[architecture])
    split = SplitTrunk.of(base, 1)
    for attention in ("eager", "sdpa"):  # they take other masks
        base.set_attn_implementation(attention)
        assert_whole(base, split)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(2)
        base.model.norm.weight.mul_(2)
    assert_whole(base, split)
    base.to(torch.bfloat16)
    assert_whole(base, split)
    other = copy.deepcopy((base, split))
    with torch.no_grad():
        other[0].model.layers[2].mlp.up_proj.weight.mul_(2)
    assert_whole(*other)
    assert_whole(base, split)


def test_outputs_of_blocks_are_recorded_once():
    base = deep_base()
    split = SplitTrunk.of(base, 1)
    inputs, asked = texts(), {"use_cache": False, "output_hidden_states": True}
    below = split.below(**inputs, **asked).hidden_states
    whole = trunk(base)(**inputs, **asked).hidden_states
    inputs.pop("input_ids")
    above = split.above(inputs_embeds=below[-1], **inputs, **asked).hidden_states
    for ours, theirs in zip((*below, *above[1:]), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_adapters_are_in_the_parts():
    base = deep_base()
    plain = trunk(base)(**texts(), use_cache=False).last_hidden_state
    adapter = with_lora(
        base, target_modules=["q_proj"], layers_to_transform=[2], lora_dropout=0.5
    )
    adapter.train()  # probing takes place without dropout, and leaves it as it is
    modes, (dropout,) = [], adapter.layers[0].lora_dropout.values()
    dropout.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    split = SplitTrunk.of(base, 2)
    assert modes and not any(modes) and dropout.training
    adapter.train(False)
    adapted = through(split, **texts())
    assert (adapted - plain).abs().max() > 1e-3
    assert_whole(base, split)
    with adapter.off():
        assert torch.equal(through(split, **texts())[0], plain[0])
    adapter.merge()
    assert_whole(base, split)
    adapter.unmerge()
    assert torch.equal(through(split, **texts())[0], adapted[0])


# --- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_of_the_upper_part_are_those_of_the_whole(reentrant):
    base = deep_base()
    adapter = with_lora(base, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3])
    split = SplitTrunk.of(base, lowest_adapted(base))
    inputs = texts()
    with torch.no_grad():
        states = split.below(**inputs, use_cache=False).last_hidden_state
    whole = trunk(base)(**inputs, use_cache=False).last_hidden_state
    expected = torch.autograd.grad(whole.square().sum(), list(adapter.parameters()))
    if reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        adapter.train()
    runs = []
    for block in base.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, args: runs.append(module))
    inputs.pop("input_ids")
    ours = split.above(inputs_embeds=states, **inputs, use_cache=False).last_hidden_state
    ours.square().sum().backward()
    for parameter, theirs in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, atol=1e-5, rtol=1e-5)
    assert len(runs) == (2 if reentrant is None else 4) and not states.requires_grad


# --- the lowest adapted block ---------------------------------------------------------------


@pytest.mark.parametrize("options, lowest", [
    ({"target_modules": ["q_proj"]}, 0),
    ({"target_modules": ["q_proj"], "layers_to_transform": [3, 1]}, 1),
    ({"target_modules": r".*layers\.[23]\.(mlp\.down|self_attn\.k)_proj", "use_dora": True}, 2),
    ({"target_modules": ["q_proj"], "layers_to_transform": [3],
      "modules_to_save": ["post_attention_layernorm"]}, 0),
    ({"target_modules": ["q_proj", "embed_tokens"]}, None),
    ({"target_modules": ["q_proj"], "layers_to_transform": [3], "modules_to_save": ["norm"]}, None),
])
def test_the_lowest_adapted_block(options, lowest):
    base = deep_base()
    assert lowest_adapted(base) is None
    with_lora(base, **options)
    assert lowest_adapted(base) == lowest


def test_adapted_parameters_are_where_their_module_is():
    base = deep_base("mixtral")
    with_lora(base, target_modules=[], target_parameters=["layers.2.mlp.experts.down_proj"])
    assert lowest_adapted(base) == 2
    assert_whole(base, SplitTrunk.of(base, 2))
