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
from qadapter.policy.decoding import StreamCache
from qadapter.trunk.caches import CACHE, is_paged, name_of_cache, take_cache

NAMES = ("past_key_values", "cache")
IDS = torch.tensor([ROWS[0]])


@pytest.fixture(scope="module", params=["head", "one stream", "two streams"])
def model(request):
    adapter = AdapterConfig(rank=4)
    if request.param != "head":
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj"])
    objective = ObjectiveConfig(alpha_0=0.5, alpha_tilde=2.0)
    model = QAdapterModel.from_base(tiny_base("qwen3"), adapter, objective).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_policy(strength=0.4 if request.param == "two streams" else 1.0)
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
