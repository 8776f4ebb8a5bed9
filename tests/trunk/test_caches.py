"""A cache is served by every name that transformers has had for it; none is warned of."""

from __future__ import annotations

import logging
import warnings

import peft
import pytest
import torch
from naive import LENGTH, ROWS, left_padded, stock
from tiny_models import tiny_base
from transformers import DynamicCache

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.policy.stream_cache import StreamCache
from qadapter.trunk.caches import CACHE, CachePart, is_paged, name_of_cache, take_cache

NAMES = ("past_key_values", "cache")
IDS = torch.tensor([ROWS[0]])


@pytest.fixture(scope="module", params=["head", "one stream", "two streams", "shared below"])
def model(request):
    adapter = AdapterConfig(rank=4)
    if request.param != "head":
        layers = [1] if request.param == "shared below" else None
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=layers)
    objective = ObjectiveConfig(alpha_0=0.5, alpha_tilde=2.0)
    model = QAdapterModel.from_base(tiny_base("qwen3"), adapter, objective).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_policy(strength=1.0 if request.param in ("head", "one stream") else 0.4)
    return model


@pytest.fixture
def complaints():
    """Deprecations that Python or transformers speak of: empty, or somebody's screen is full."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    logger.removeHandler(handler)
    found += [str(w.message) for w in caught if w.category is FutureWarning]
    assert not [line for line in found if "deprecated" in line]


def new_cache(model):
    cache, streams = DynamicCache(config=model.base.config), len(model._streams(None))
    return cache if streams == 1 else StreamCache(cache, streams)


@pytest.mark.parametrize("name", NAMES)
def test_forward_by_either_name(model, name, complaints):
    with torch.no_grad():
        whole = model(IDS).logits[:, -1]
        first = model(IDS[:, :-1], use_cache=True)
        second = model(IDS[:, -1:], **{name: first[CACHE]})
        torch.testing.assert_close(second.logits[:, -1], whole, atol=1e-5, rtol=1e-5)
        given = new_cache(model)
        outputs = model(IDS, **{name: given})
    assert outputs[CACHE] is given and given.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_generate_by_either_name(model, name, complaints):
    cache, ids = new_cache(model), IDS
    for _ in range(2):
        options = LENGTH | {"attention_mask": torch.ones_like(ids)}
        answer = model.generate(ids, **options, **{name: cache})
        assert torch.equal(answer, model.generate(ids, **options))
        ids = torch.cat([answer, torch.tensor([[7, 8]])], dim=1)
    assert cache.get_seq_length() == answer.shape[1] - 1


@pytest.mark.parametrize("settings", [
    {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 2}, {"use_cache": False},
], ids=str)
def test_no_way_to_generate_is_warned_of(model, settings, complaints):
    one_row = "prompt_lookup_num_tokens" in settings
    inputs = left_padded(ROWS[:1] if one_row else ROWS)
    stock(lambda: tiny_base().generate(**inputs, **LENGTH | settings))
    model.generate(**inputs, **LENGTH | settings)


def test_a_cache_is_given_once(model):
    cache = new_cache(model)
    with pytest.raises(QAdapterError, match="two names of one thing"):
        model(IDS, cache=cache, past_key_values=cache)
    with pytest.raises(QAdapterError, match="two names of one thing"):
        model.generate(IDS, cache=cache, past_key_values=cache)
    assert take_cache({"cache": None, "past_key_values": cache}) is cache


def test_a_paged_cache_is_told_by_its_type():
    from qadapter.policy.continuous_batching import StreamOfCache

    assert is_paged(StreamOfCache(None, 0))
    assert not is_paged(DynamicCache()) and not is_paged(None) and not is_paged(object())


@pytest.mark.parametrize("architecture", ["llama", "phi", "mixtral"])
def test_attention_models_call_it_what_transformers_does(architecture):
    assert name_of_cache(tiny_base(architecture).model) == CACHE


def test_a_part_sees_its_own_layers():
    """By their numbers in the whole, or from 0 on, as a trunk asks about its mask."""
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    config = tiny_base(
        "gemma3_text", num_hidden_layers=4, head_dim=8, sliding_window=3, layer_types=types
    ).config
    whole = DynamicCache(config=config)
    below, above = CachePart(whole, 0, 2), CachePart(whole, 2, 4)
    keys = torch.zeros(1, 1, 5, 8)
    below.update(keys, keys, 0)
    assert below.get_seq_length() == 5 and above.get_seq_length() == 0
    assert above.update(keys[:, :, :2], keys[:, :, :2], 3)[0].shape[2] == 2
    assert whole.get_seq_length(3) == above.get_seq_length(3) == 2
    assert [below.get_seq_length(n) for n in (0, 1)] == [5, 0]
    above.update(keys, keys, 2)
    assert above.get_seq_length() == 5
    windowed = above.is_sliding.index(True)
    assert above.get_mask_sizes(1, windowed) == whole.get_mask_sizes(1, 2) == (3, 3)
    full = above.is_sliding.index(False)
    assert above.get_mask_sizes(1, full) == whole.get_mask_sizes(1, 3) == (3, 0)
