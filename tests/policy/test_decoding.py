"""LoRA in the trunk decodes the policy of its definition: one stream, or both in one batch.

The definition runs stock PEFT on one copy of the base and the plain base on another, over
everything at every step (``naive``).
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from naive import (
    LENGTH,
    MODES,
    ROWS,
    NaivePolicy,
    batched_in_small_steps,
    left_padded,
    stock,
    uncached,
)
from tiny_models import batches_continuously, tiny_base
from transformers import DynamicCache, StaticCache, TextStreamer

from qadapter import ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.adapters.lora import LoraAdapter
from qadapter.adapters.streams import BASE
from qadapter.policy.continuous_batching import PagedStreams
from qadapter.policy.stream_cache import StreamCache
from qadapter.trunk.caches import CACHE

POLICY = ObjectiveConfig(alpha_0=0.5, alpha_tilde=2.0)
AUTHORS = ObjectiveConfig.authors()
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
ADAPTERS = {
    "lora": LORA,
    "dora": LORA | {"use_dora": True},
    "all linear": {"r": 4, "target_modules": "all-linear", "use_rslora": True},
    "embeddings": LORA | {"target_modules": ["embed_tokens", "o_proj"]},
    "norm": LORA | {"modules_to_save": ["norm"]},
    "experts": {"r": 4, "target_modules": [], "target_parameters": [
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    ]},
    "parameters": {"r": 4, "target_modules": [], "target_parameters": ["q_proj.weight"]},
    "top": LORA | {"layers_to_transform": [2, 3]},
    "top dora": LORA | {"layers_to_transform": [3], "use_dora": True},
    "top experts": {"r": 4, "target_modules": [], "target_parameters": [
        "layers.3.mlp.experts.gate_up_proj", "layers.3.mlp.experts.down_proj",
    ]},
}
"""Those of the top are for bases of four blocks."""
SHARING = {
    "llama": {}, "qwen3": {}, "phi": {}, "granite": {}, "cohere": {},
    "mixtral": {}, "mistral": {"sliding_window": 6}, "gemma2": {"sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6,
                    "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "cohere2": {"sliding_window": 6,
                "layer_types": ["full_attention", "full_attention"] + ["sliding_attention"] * 2},
}
"""Bases whose blocks below an adapter run once: windows in one part alone, or in both."""


def lora_pair(objective=POLICY, adapter="lora", architecture="llama", seed=0, **changes):
    """Our model, and the definition of its policy by stock PEFT."""
    if adapter.startswith("top"):
        changes["num_hidden_layers"] = 4
    base = tiny_base(architecture, seed, **changes)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**ADAPTERS[adapter])).eval()
    torch.manual_seed(seed + 1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model = QAdapterModel.from_base(
        copy.deepcopy(base), peft.LoraConfig(**ADAPTERS[adapter]), objective
    ).eval()
    model.adapter.load_state_dict(
        peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    )
    return model, NaivePolicy(theirs, base, objective)


@pytest.fixture(scope="module", params=["policy", "authors", "top", "top windows"])
def pair(request):
    if request.param == "top windows":
        return lora_pair(POLICY, "top", "gemma3_text", **SHARING["gemma3_text"])
    if request.param == "top":
        return lora_pair(AUTHORS, "top")
    return lora_pair(POLICY if request.param == "policy" else AUTHORS)


def block_rows(model) -> list[list[int]]:
    """Rows of every forward of each block from here on."""
    blocks = model.base.model.layers
    rows: list[list[int]] = [[] for _ in blocks]
    for block, seen in zip(blocks, rows, strict=True):
        block.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
    return rows


def trunk_rows(model) -> list[int]:
    """Rows of every forward of the trunk from here on."""
    rows = []
    model.base.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    return rows


# --- logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [n for n in ADAPTERS if "experts" not in n])
@pytest.mark.parametrize("objective", [POLICY, AUTHORS], ids=["policy", "q"])
def test_policy_of_every_kind_of_adapter(objective, adapter):
    model, naive = lora_pair(objective, adapter)
    inputs = left_padded(ROWS)
    real = inputs["attention_mask"].bool()
    for strength in (0.0, 0.4, 1.0, 1.8, torch.tensor([0.0, 1.0, 2.0])):
        ours = model(**inputs, strength=strength).logits.log_softmax(-1)[real]
        theirs = naive(**inputs, strength=strength).logits.log_softmax(-1)[real]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours - naive.base(**inputs).logits.log_softmax(-1)[real]).abs().max() > 0.1


@pytest.mark.parametrize(
    "architecture",
    ["qwen3", "gemma2", "mistral", "phi", "granite", "cohere", "mixtral", "qwen3_moe"],
)
def test_policy_of_every_architecture(architecture):
    model, naive = lora_pair(AUTHORS, architecture=architecture)
    inputs = left_padded(ROWS)
    real = inputs["attention_mask"].bool()
    ours = model(**inputs, strength=0.7).logits.log_softmax(-1)[real]
    theirs = naive(**inputs, strength=0.7).logits.log_softmax(-1)[real]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    settings = LENGTH | {"strength": 0.7}
    assert torch.equal(model.generate(**inputs, **settings), naive.generate(**inputs, **settings))


@pytest.mark.parametrize("architecture, adapter", [
    ("gpt_neox", "all linear"), ("mixtral", "all linear"), ("mixtral", "experts"),
    ("qwen3_moe", "all linear"), ("qwen3_moe", "experts"), ("qwen3_moe", "top experts"),
])
def test_policy_of_other_layers(architecture, adapter):
    """Fused projections; routers, which give tuples; experts, which see all tokens of a batch as
    one list."""
    model, naive = lora_pair(AUTHORS, adapter, architecture)
    inputs = left_padded(ROWS)
    real = inputs["attention_mask"].bool()
    ours = model(**inputs, strength=0.7).logits.log_softmax(-1)[real]
    theirs = naive(**inputs, strength=0.7).logits.log_softmax(-1)[real]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_trained_policy_and_base_need_one_stream():
    model, _ = lora_pair(POLICY)
    rows, inputs = trunk_rows(model), left_padded(ROWS)
    model(**inputs)
    model(**inputs, strength=0.0)
    assert rows == [3, 3]
    model(**inputs, strength=0.5)
    model.set_policy(alpha_0=0.1)
    model(**inputs)
    assert rows[2:] == [6, 6]


def test_both_streams_are_those_of_the_model_alone():
    """Bitwise: an adapter gated off per row is no approximation."""
    model, naive = lora_pair(AUTHORS)
    ids = torch.tensor(ROWS[0] + ROWS[1])[None]
    outputs = model._run((0, BASE), input_ids=ids, use_cache=False)
    h_a, h_b = outputs.last_hidden_state.chunk(2)
    torch.testing.assert_close(h_b, naive.base.model(ids).last_hidden_state, atol=1e-6, rtol=1e-5)
    expected = naive.adapted.base_model.model.model(ids).last_hidden_state
    torch.testing.assert_close(h_a, expected, atol=1e-6, rtol=1e-5)


def test_outputs_are_those_of_the_adapted_stream():
    model, _ = lora_pair(AUTHORS)
    inputs = left_padded(ROWS)
    outputs = model(**inputs, output_hidden_states=True, logits_to_keep=2)
    assert outputs.logits.shape[:2] == (3, 2)
    expected = model._run((0,), **inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(outputs.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


# --- blocks that all streams have in common ---------------------------------------------------


@pytest.mark.parametrize("architecture", SHARING)
def test_common_blocks_run_once_for_all_streams(architecture):
    model, naive = lora_pair(AUTHORS, "top", architecture, **SHARING[architecture])
    rows, inputs = block_rows(model), left_padded(ROWS)
    real = inputs["attention_mask"].bool()
    assert model.adapter.split.decodes  # probed, with rows of its own
    for seen in rows:
        seen.clear()
    ours = model(**inputs, strength=0.7).logits.log_softmax(-1)[real]
    assert rows == [[3], [3], [6], [6]]
    theirs = naive(**inputs, strength=0.7).logits.log_softmax(-1)[real]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for settings in (LENGTH, LENGTH | {"num_beams": 2}):
        settings = settings | {"strength": 0.7}
        expected = naive.generate(**inputs, **settings)
        assert torch.equal(model.generate(**inputs, **settings), expected)
    assert all(max(seen) == most for seen, most in zip(rows, (6, 6, 12, 12), strict=True))


def test_the_cost_of_a_dial_is_that_of_the_blocks_above():
    """1 + k/L of one stream, with k adapted blocks at the top of L."""
    batch, depth, adapted = 8, 4, 1
    model, _ = lora_pair(POLICY, "top dora")
    rows, ids = block_rows(model), torch.randint(1, 96, (batch, 5))
    costs = []
    for strength in (1.0, 0.5):
        model.generate(ids, **LENGTH, strength=strength)  # the first one probes
        for seen in rows:
            seen.clear()
        model.generate(ids, **LENGTH, strength=strength)
        costs.append(sum(map(sum, rows)))
    assert costs[1] == costs[0] * (1 + adapted / depth)


def test_a_base_that_can_not_be_split_runs_whole():
    model, naive = lora_pair(AUTHORS, "top", "granite", embedding_multiplier=3.0)
    rows, inputs = block_rows(model), left_padded(ROWS)
    assert model.split_trunk is None and "GraniteForCausalLM can't be run" in model.split_refused
    for seen in rows:
        seen.clear()
    ours = model.generate(**inputs, **LENGTH, strength=0.4)
    assert torch.equal(ours, naive.generate(**inputs, **LENGTH, strength=0.4))
    assert all(set(seen) == {6} for seen in rows)


def test_hidden_streams_share_blocks_without_gradients():
    model, naive = lora_pair(AUTHORS, "top")
    inputs = left_padded(ROWS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = model.hidden_streams(ids, mask)
    assert expected[0].requires_grad
    rows = block_rows(model)
    with torch.no_grad():
        model.hidden_streams(ids, mask)
        for seen in rows:
            seen.clear()
        found = model.hidden_streams(ids, mask)
    assert rows == [[3], [3], [3, 3], [3, 3]]
    real = mask.bool()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[real], theirs[real])
    assert torch.equal(found[1][real], naive.base.model(**inputs).last_hidden_state[real])


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_recorded_outputs_are_those_of_the_adapted_stream(asked):
    model, _ = lora_pair(AUTHORS, "top", attn_implementation="eager")
    ids = torch.tensor([ROWS[0], ROWS[0][::-1]])
    outputs = model(ids, **{asked: True})
    name = asked.removeprefix("output_")
    expected = model._run((0,), input_ids=ids, **{asked: True})[name]
    for ours, theirs in zip(outputs[name], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- generate -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_generate_is_the_definition(pair, mode, strength):
    model, naive = pair
    inputs, settings = left_padded(ROWS), LENGTH | MODES[mode] | {"strength": strength}
    torch.manual_seed(3)
    ours = model.generate(**inputs, **settings)
    torch.manual_seed(3)
    assert torch.equal(ours, naive.generate(**inputs, **uncached(settings)))


@pytest.mark.parametrize("adapter", ["dora", "embeddings", "norm"])
def test_generate_with_other_adapters(adapter):
    model, naive = lora_pair(AUTHORS, adapter)
    inputs = left_padded(ROWS)
    ours = model.generate(**inputs, **LENGTH)
    assert torch.equal(ours, naive.generate(**inputs, **LENGTH))
    assert not torch.equal(ours, naive.base.generate(**inputs, **LENGTH))


def test_generate_with_a_strength_for_each_row(pair):
    model, naive = pair
    inputs, strength = left_padded(ROWS), torch.tensor([0.0, 1.0, 2.0])
    for settings in (LENGTH, LENGTH | {"num_beams": 2}):
        ours = model.generate(**inputs, **settings, strength=strength)
        assert torch.equal(ours, naive.generate(**inputs, **settings, strength=strength))


def test_prompt_lookup_and_assistants(pair):
    model, naive = pair
    ids = torch.tensor([[5, 9, 11, 3, 5, 9, 11, 3, 5, 9]])
    stock(lambda: naive.base.generate(ids, **LENGTH, prompt_lookup_num_tokens=3))
    for strength in (1.0, 0.4):
        settings = LENGTH | {"strength": strength}
        expected = naive.generate(ids, **settings)
        assert torch.equal(model.generate(ids, **settings, prompt_lookup_num_tokens=3), expected)
        for assistant in (tiny_base(), lora_pair(AUTHORS, seed=2)[0]):
            ours = model.generate(ids, **settings, assistant_model=assistant)
            assert torch.equal(ours, expected)


def test_embeddings_as_input(pair):
    model, naive = pair
    ids = torch.tensor([ROWS[0]])
    embeds = model.get_input_embeddings()(ids)
    ours = model.generate(inputs_embeds=embeds, **LENGTH, strength=0.4)
    assert torch.equal(ours, naive.generate(ids, **LENGTH, strength=0.4)[:, ids.shape[1]:])


def test_chunked_prefill(pair):
    model, naive = pair
    ids = torch.tensor([ROWS[0] + ROWS[1]])
    stock(lambda: naive.base.generate(ids, **LENGTH, prefill_chunk_size=4))
    for settings in ({}, {"cache_implementation": "static"}):
        ours = model.generate(ids, **LENGTH, strength=0.4, prefill_chunk_size=4, **settings)
        assert torch.equal(ours, naive.generate(ids, **LENGTH, strength=0.4))


def test_streamer(pair):
    class Collect(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    model, naive = pair
    streamer, ids = Collect(), torch.tensor([ROWS[0]])
    model.generate(ids, **LENGTH, strength=0.4, streamer=streamer)
    assert streamer.tokens == naive.generate(ids, **LENGTH, strength=0.4)[0].tolist()


@batches_continuously
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3_moe"])
@pytest.mark.parametrize("strength, streams", [(0.0, 1), (1.0, 1), (0.4, 2)])
def test_continuous_batching(architecture, strength, streams):
    model, naive = lora_pair(POLICY, architecture=architecture)
    stock(lambda: batched_in_small_steps(naive.base, ROWS[:1], 1))
    model.set_policy(strength=strength)
    assert len(model._streams(None)) == streams
    rows = [*ROWS, ROWS[0] + ROWS[1] + ROWS[2]]
    for row, answer in zip(rows, batched_in_small_steps(model, rows, 6), strict=True):
        expected = naive.generate(
            torch.tensor([row]), max_new_tokens=6, do_sample=False, strength=strength
        )
        assert answer == expected[0, len(row):].tolist()


def test_continuous_batching_of_an_older_transformers_is_refused(monkeypatch):
    model, _ = lora_pair(POLICY)
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(QAdapterError, match=r"5\.17\.0 is installed: use generate"):
        model.generate_batch(inputs=ROWS)


def test_a_policy_stays_while_it_is_served():
    model, _ = lora_pair(POLICY)
    model.set_policy(strength=0.4)
    served = PagedStreams(model, model._streams(None))
    assert served.config.num_hidden_layers == 2 * model.config.num_hidden_layers
    model.set_policy(strength=1.0)
    with pytest.raises(QAdapterError, match="set anew"):
        served(input_ids=torch.tensor([ROWS[0]]))


# --- caches ---------------------------------------------------------------------------------


def test_cache_carries_over_turns(pair):
    model, naive = pair
    for make in (
        lambda: StreamCache(DynamicCache(config=model.config)),
        lambda: StreamCache(StaticCache(config=model.config, max_cache_len=64)),
    ):
        cache, ids = make(), torch.tensor([ROWS[0]])
        for turn in ([], [40, 41, 42]):
            ids = torch.cat([ids, torch.tensor([turn], dtype=torch.int64)], dim=1)
            ours = model.generate(ids, **LENGTH, past_key_values=cache, strength=0.4)
            assert torch.equal(ours, naive.generate(ids, **LENGTH, strength=0.4))
            ids = ours


def test_forward_by_hand_keeps_both_streams(pair):
    model, naive = pair
    ids = torch.tensor(ROWS[0])[None].repeat(2, 1)
    first = model(ids[:, :4], strength=0.4, use_cache=True)
    cache = first[CACHE]
    assert isinstance(cache, StreamCache) and cache.rows == 2
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    cache.crop(-1)
    second = model(ids[:1, 3:].repeat(3, 1), strength=0.4, past_key_values=cache)
    expected = naive(ids, strength=0.4).logits[:1, 3:].log_softmax(-1)
    ours = second.logits.log_softmax(-1)
    torch.testing.assert_close(ours, expected.expand_as(ours), atol=1e-4, rtol=0)


@torch.no_grad()
def test_common_layers_hold_one_stream():
    model, _ = lora_pair(POLICY, "top")
    ids = torch.tensor([ROWS[0], ROWS[0]])
    for make in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=16)):
        cache = StreamCache(make(config=model.config), 2)
        model(ids, strength=0.4, past_key_values=cache)
        assert [len(layer.keys) for layer in cache.layers] == [2, 2, 4, 4]
        assert cache.get_seq_length() == ids.shape[1] and cache.rows == 2
        assert cache.batch_size in (2, -1)
        model(ids[:, :1], strength=0.4, past_key_values=copy.deepcopy(cache))
        assert cache.get_seq_length() == ids.shape[1]


def test_a_cache_filled_with_other_common_layers_is_refused():
    (model, _), (other, _) = lora_pair(POLICY, "top"), lora_pair(POLICY, "top dora")
    ids, cache = torch.tensor([ROWS[0]]), StreamCache(DynamicCache(config=model.config))
    model(ids, strength=0.4, past_key_values=cache)
    with pytest.raises(QAdapterError, match="filled with 2 layers common"):
        other(ids, strength=0.4, past_key_values=cache)


def test_inputs_beside_a_text_run_whole():
    """What is merged into embeddings (images) must not meet states of the upper part."""
    model, _ = lora_pair(POLICY, "top")
    ids, beside = torch.tensor([ROWS[0]]), {"images": torch.ones(1, 3)}
    expected = model(ids, strength=0.4).logits
    rows = block_rows(model)
    first = model(ids[:, :-1], strength=0.4, use_cache=True, **beside)
    second = model(ids[:, -1:], strength=0.4, past_key_values=first[CACHE])
    assert rows == [[2, 2]] * 4
    torch.testing.assert_close(second.logits, expected[:, -1:], atol=1e-5, rtol=1e-5)
    cache = model(ids[:, :-1], strength=0.4, use_cache=True)[CACHE]
    with pytest.raises(QAdapterError, match="filled with 2 layers common"):
        model(ids[:, -1:], strength=0.4, past_key_values=cache, **beside)


def test_reordered_caches_keep_streams_apart():
    layers = DynamicCache(config=tiny_base().config)
    cache = StreamCache(layers)
    cache.rows = 2
    marks = torch.arange(4.0).view(4, 1, 1, 1)  # rows 0, 1 adapted, rows 2, 3 of the base
    cache.update(marks, marks, 0)
    cache.update(marks, marks, 1)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].keys.flatten().tolist() == [1, 1, 3, 3]


def test_rows_of_common_layers_are_the_batchs():
    cache = StreamCache(DynamicCache(config=tiny_base().config))
    cache.share(1)
    cache.rows = 2
    marks = torch.arange(4.0).view(4, 1, 1, 1)
    cache.below.update(marks[:2], marks[:2], 0)
    cache.above.update(marks, marks, 1)
    keys = [layer.keys for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert [layer.keys.flatten().tolist() for layer in cache.layers] == [[1, 0], [1, 0, 3, 2]]
    cache.batch_repeat_interleave(2)
    assert cache.rows == 4
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert [layer.keys.flatten().tolist() for layer in cache.layers] == [[1, 0], [1, 0, 3, 2]]
    assert keys[0].shape[0] == 2 and cache.rows == 2


def test_wrong_caches_are_refused():
    model, _ = lora_pair(POLICY)
    ids, plain = torch.tensor([ROWS[0]]), DynamicCache(config=model.config)
    with pytest.raises(QAdapterError, match="StreamCache"):
        model.generate(ids, **LENGTH, strength=0.4, past_key_values=plain)
    with pytest.raises(QAdapterError, match="adapter stream alone"):
        model.generate(ids, **LENGTH, past_key_values=StreamCache(plain))
    filled = DynamicCache(config=model.config)
    answer = model.generate(ids, **LENGTH, past_key_values=filled)
    with pytest.raises(QAdapterError, match="hold the adapter stream, this policy runs base"):
        model.generate(answer, **LENGTH, past_key_values=filled, strength=0.0)
    with pytest.raises(QAdapterError, match="no layers yet"):
        StreamCache(DynamicCache())


def test_experts_that_see_tokens_out_of_order_are_refused():
    """Row 1 of 2 is not the base's where a layer sees tokens of both in an order of its own."""
    model, _ = lora_pair(AUTHORS)
    layer = model.base.model.layers[0].self_attn.q_proj
    with model.adapter.on((0, BASE), 4, 3), pytest.raises(QAdapterError, match="out of order"):
        layer(torch.zeros(5, 32))
    assert isinstance(model.adapter, LoraAdapter)
