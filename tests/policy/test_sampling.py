"""Fused sampling through generate: the same distribution as transformers' own draw."""

from __future__ import annotations

import math

import interpreter  # first: it decides how triton is imported
import pytest
import torch
from naive import ROWS, left_padded
from tiny_models import tiny_base
from transformers import GenerationConfig, LogitsProcessorList, TypicalLogitsWarper, generation

from qadapter import AdapterConfig, QAdapterModel
from qadapter.errors import QAdapterError
from qadapter.policy import sampling
from qadapter.policy.sampling import draw_by_lookup, fused_sample
from qadapter_kernels.triton import launch

pytestmark = interpreter.quiet
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernel draws")
DEVICE = interpreter.DEVICE
FILTERS = {
    "all tokens": ({}, 200, (1.0, 0, 1.0, 0.0)),
    "temperature": ({"temperature": 0.6}, 200, (0.6, 0, 1.0, 0.0)),
    "top-p": ({"top_p": 0.7, "temperature": 1.3}, 30, (1.3, 0, 0.7, 0.0)),
    "min-p": ({"min_p": 0.2}, 200, (1.0, 0, 1.0, 0.2)),
    "together": (
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05}, 20, (1.5, 20, 0.9, 0.05)
    ),
    "with a penalty": ({"repetition_penalty": 3.0, "top_k": 8}, 30, (1.0, 8, 1.0, 0.0)),
    "with typical-p": ({"typical_p": 0.6, "top_k": 30}, 200, (1.0, 0, 1.0, 0.0)),
}
"""Options of generate, draws (thresholds take the interpreter long), and what the kernel is told:
what comes after it stays with transformers."""


@pytest.fixture(scope="module")
def model() -> QAdapterModel:
    torch.manual_seed(0)
    model = QAdapterModel.from_base(tiny_base(), AdapterConfig(rank=4)).to(DEVICE)
    torch.nn.init.normal_(model.adapter.up.weight, std=0.2)
    return model


def generate(model, inputs, **options):
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 1} | options
    return model.generate(**inputs, **settings, custom_generate=fused_sample)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """For a vocabulary of 96, in the interpreter."""
    interpreter.speed_up(monkeypatch)
    monkeypatch.setitem(launch.TILES, "sample", launch.Tile(64, 4))


@pytest.fixture
def draws(monkeypatch) -> list[tuple]:
    """Arguments of every call of the kernel, which draws on a CPU too, in the interpreter."""
    monkeypatch.setattr(sampling, "_in_kernel", lambda device_type: True)
    calls, kernel = [], sampling.triton.sample

    def sample(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(sampling.triton, "sample", sample, raising=False)
    return calls


def exactly(model, prompt, **options) -> torch.Tensor:
    """[V]: the distribution that transformers draws the next token from."""
    with torch.no_grad():
        logits = model(prompt.to(DEVICE)).logits[:, -1].float()
    processors = model._get_logits_processor(
        generation_config=GenerationConfig(**{"do_sample": True, "top_k": 0} | options),
        input_ids_seq_length=prompt.shape[1], encoder_input_ids=prompt, device=DEVICE,
        logits_processor=LogitsProcessorList(),
    )
    return processors(prompt.to(DEVICE), logits).softmax(-1)[0].cpu()


def assert_drawn_from(exact: torch.Tensor, tokens: torch.Tensor) -> None:
    count, counts = len(tokens), torch.bincount(tokens, minlength=len(exact))
    assert not counts[exact == 0].any()
    # Five standard deviations of a binomial, and one count for rounding.
    allowed = 5 * (count * exact * (1 - exact)).sqrt() + 1
    assert ((counts - count * exact).abs() <= allowed).all()
    # −log p of the drawn tokens: mean entropy, five standard errors.
    surprise = torch.where(exact > 0, -exact.log(), 0.0)
    entropy = (exact * surprise).sum()
    spread = ((exact * surprise.square()).sum() - entropy.square()).clamp_min(0).sqrt()
    assert (surprise[tokens].mean() - entropy).abs() <= 5 * spread / math.sqrt(count) + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_the_kernel_follows_transformers_own_distribution(model, draws, name):
    options, count, told = FILTERS[name]
    prompt = torch.tensor([ROWS[0]])
    tokens = generate(model, {"input_ids": prompt.repeat(count, 1)}, **options)[:, -1].cpu()
    assert [call[1:5] for call in draws] == [told]
    assert_drawn_from(exactly(model, prompt, **options), tokens)


@needs_cpu
@pytest.mark.parametrize("name", FILTERS)
def test_a_cpu_follows_transformers_own_distribution(model, name):
    options, prompt = FILTERS[name][0], torch.tensor([ROWS[0]])
    tokens = generate(model, {"input_ids": prompt.repeat(2000, 1)}, **options)[:, -1]
    assert_drawn_from(exactly(model, prompt, **options), tokens)


@needs_cpu
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53], ids=["least", "most"])
def test_the_ends_of_the_uniform_numbers_draw_tokens_that_can_be(monkeypatch, uniform):
    """0 draws the first token with any probability, the largest number the last one, though a
    product with the total may round up to it."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, uniform))
    scores = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    scores[:, :3] = scores[:, -3:] = -torch.inf
    drawn = draw_by_lookup(scores)
    assert (drawn == (3 if uniform == 0 else 996)).all()


@needs_cpu
def test_rows_in_which_nothing_can_be_drawn_are_refused():
    scores = torch.zeros(2, 5)
    scores[1] = -torch.inf
    with pytest.raises(QAdapterError, match="nothing can be drawn"):
        draw_by_lookup(scores)


@needs_cpu
def test_a_plain_model_is_drawn_from_too():
    base, prompt = tiny_base(), torch.tensor([ROWS[0]])
    tokens = generate(base, {"input_ids": prompt.repeat(2000, 1)})[:, -1]
    assert_drawn_from(exactly(base, prompt), tokens)


@pytest.mark.slow
def test_a_padded_batch_over_many_steps(model, draws):
    """With one token left to draw from, sampling is greedy: positions, caches and ends included."""
    greedy = model.generate(
        **{k: v.to(DEVICE) for k, v in left_padded(ROWS).items()}, do_sample=False,
        max_new_tokens=8, eos_token_id=7,
    )
    fused = generate(model, left_padded(ROWS), max_new_tokens=8, eos_token_id=7, top_k=1)
    assert torch.equal(fused, greedy) and len(draws) == greedy.shape[1] - 6
    steps = [call[-1] for call in draws]
    assert steps == list(range(len(steps))) and len({call[-2] for call in draws}) == 1


def test_draws_follow_the_seed(model):
    prompt = {"input_ids": torch.tensor(ROWS[:1] * 8)}
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(generate(model, prompt, max_new_tokens=4))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_scores_of_16_bits_are_searched_as_such(draws):
    base = tiny_base().to(DEVICE, torch.bfloat16)
    half = QAdapterModel.from_base(base)
    prompt = {"input_ids": torch.tensor(ROWS[:1])}
    generate(half, prompt)
    generate(half, prompt, repetition_penalty=1.3)
    assert [call[0].dtype for call in draws] == [torch.bfloat16, torch.float32]


def test_raw_logits_are_left_alone(model):
    prompt = {"input_ids": torch.tensor(ROWS[:1])}
    out = generate(model, prompt, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        expected = model(prompt["input_ids"].to(DEVICE)).logits[:, -1].float()
    assert (out.logits[0] - expected).abs().max() < 1e-5


def test_what_runs_as_it_is(model, draws):
    """Scores asked for, and greedy decoding: transformers' own loop."""
    prompt = {"input_ids": torch.tensor(ROWS[:1])}
    out = generate(model, prompt, top_k=3, return_dict_in_generate=True, output_scores=True)
    assert int((out.scores[0] > -torch.inf).sum()) == 3
    generate(model, prompt, do_sample=False)
    assert not draws
    config = GenerationConfig(return_dict_in_generate=True, output_scores=True)
    for device in ("cuda", "cpu"):
        assert "output_scores" in sampling.unavailable_reason(device, config)
    assert "backend" in sampling.unavailable_reason("mps", GenerationConfig())


def test_other_ways_of_generating_are_refused(model):
    with pytest.raises(QAdapterError, match="beam"):
        generate(model, {"input_ids": torch.tensor(ROWS[:1])}, num_beams=2)


def test_only_filters_in_the_kernels_order_are_taken_over():
    warm, k = generation.TemperatureLogitsWarper(0.5), generation.TopKLogitsWarper(4)
    p, m = generation.TopPLogitsWarper(0.9), generation.MinPLogitsWarper(0.1)
    typical, two = TypicalLogitsWarper(0.5), generation.TopPLogitsWarper(0.9, min_tokens_to_keep=2)
    for given, left in (
        ([warm, k, p, m], []), ([typical, k, m], [typical]), ([k, typical], [k, typical]),
        ([p, k], [p]), ([k, k], [k]), ([m, warm], [m]), ([two, m], [two]), ([], []),
    ):
        others, filters = sampling._split(LogitsProcessorList(given))
        assert (others, others + filters) == (left, given)
