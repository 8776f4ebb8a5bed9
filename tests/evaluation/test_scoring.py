"""Scores of states: beside the definition in float64, whatever the head; and what they cost."""

import numpy as np
import peft
import pytest
import torch
from tiny_models import tiny_adapter, tiny_base, tiny_llama, tokenized

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.evaluation import evaluate_preferences, evaluate_retention, scoring
from qadapter.evaluation.scoring import Scorer, evaluating
from qadapter.training.features import compute_features
from qadapter.trunk.memo import TrunkMemo
from qadapter_kernels import reference

ARCHITECTURES = ("llama", "phi", "gemma2", "granite", "cohere")
"""Of a plain head, a bias, a softcap, two kinds of scale."""
OBJECTIVES = {
    "policy": ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.7),
    "q": ObjectiveConfig(parametrization="q", alpha_0=0.5, alpha_tilde=2.0),
}
STRENGTHS = (0.0, 0.5, 1.0, 2.0)
IDS = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(2))


def build(architecture="llama", objective=None, trained=True, form="linear", dtype=None):
    base = tiny_base(architecture)
    if architecture == "phi":  # what a head excludes stays excluded
        base.get_output_embeddings().bias.data[[7, 20]] = -torch.inf
    model = QAdapterModel.from_base(base, AdapterConfig(form=form, rank=4), objective)
    if trained:
        torch.manual_seed(1)
        torch.nn.init.normal_(model.adapter.up.weight, std=0.3)
    return model if dtype is None else model.to(dtype)


def streams(model):
    """h_a, h_b and the token that follows, of a few states."""
    with torch.no_grad():
        hidden = model.hidden_streams(IDS, torch.ones_like(IDS))
    return *(x[:, :-1].flatten(0, 1) for x in hidden), IDS[:, 1:].flatten()


def definition(model, h_a, h_b, actions, strength):
    """Two tensors of logits in float64, and everything from them."""
    head = model.head

    def logits(hidden):
        products = hidden.double() @ head.weight.double().T
        x = head.logit_scale * (products if head.bias is None else products + head.bias.double())
        return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)

    weights = scoring.Policy(model.objective, strength).stream_weights()
    return reference.score_rows(
        logits(h_a), logits(h_b), actions, weights, model.objective.coefficients
    )


def check(found, exact, **tolerance):
    pairs = {
        "q": (found.soft.q_action, exact.q_action), "V": (found.soft.value, exact.value),
        "lse(b)": (found.soft.base_logsumexp, exact.base_logsumexp),
        **{name: (getattr(found, name), getattr(exact, name))
           for name in found._fields if name != "soft"},
    }
    for name, (x, y) in pairs.items():
        torch.testing.assert_close(x.double(), y, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_the_definition_s(architecture, objective, strength):
    model = build(architecture, OBJECTIVES[objective])
    states = streams(model)
    with evaluating(model):
        found = Scorer(model, strength=strength).score(*states)
    # Float32 logits of size ten, two or three of them added.
    check(found, definition(model, *states, strength), atol=3e-5, rtol=3e-6)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_a_float64_model_is_scored_in_float64(strength):
    model = build("cohere", OBJECTIVES["policy"], dtype=torch.float64)
    states = streams(model)
    with evaluating(model):
        found = Scorer(model, strength=strength).score(*states)
    assert found.base_logprob.dtype == torch.float64
    check(found, definition(model, *states, strength), atol=1e-11, rtol=1e-11)


def test_a_16_bit_model_is_scored_in_float32():
    model = build("phi", OBJECTIVES["policy"], dtype=torch.bfloat16)
    states = streams(model)
    with evaluating(model):
        found = Scorer(model).score(*states)
    check(found, definition(model, *states, 1.0), atol=3e-5, rtol=3e-6)


@pytest.mark.parametrize("strength", [*STRENGTHS, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_that_does_nothing_is_the_base_to_the_last_bit(architecture, strength):
    model = build(architecture, trained=False)
    plain = tiny_base(architecture)
    if architecture == "phi":
        plain.get_output_embeddings().bias.data[[7, 20]] = -torch.inf
    states = streams(model)
    with evaluating(model), evaluating(plain):
        found = Scorer(model, strength=strength).score(*states)
        base = Scorer(plain).score(*states)
    for scores in (found, base):
        assert torch.equal(scores.policy_logprob, scores.base_logprob)
        assert scores.same_top1.all()
        finite = scores.soft.q_action.isfinite()
        for x in (scores.kl_base_policy, scores.kl_policy_base, scores.soft.value,
                  scores.soft.q_action[finite]):
            assert not x.any()
    assert torch.equal(found.base_logprob, base.base_logprob)


def test_what_is_the_base_costs_one_product_and_no_adapted_stream(monkeypatch):
    model, texts = tiny_adapter(trained=True), [[5, 6, 7, 8], [9, 10, 11]]
    expected = evaluate_retention(model, texts, num_resamples=5)
    monkeypatch.setattr(model.adapter, "forward", None)
    at_zero = evaluate_retention(model, texts, strength=0.0, num_resamples=5)
    assert at_zero.perplexity_base == expected.perplexity_base
    assert at_zero.perplexity == at_zero.perplexity_base and at_zero.kl_per_token.value == 0


@pytest.mark.parametrize("alignment", ["action", "state"])
def test_every_state_is_scored_once(monkeypatch, alignment):
    """Whatever two alignments have in common, and a pair's rewards are what they were."""
    model = tiny_adapter(trained=True, objective=ObjectiveConfig(mask_alignment=alignment))
    dataset, rows = tokenized(), []
    score = Scorer.score

    def counted(self, adapter_hidden, base_hidden, actions):
        rows.append(len(actions))
        return score(self, adapter_hidden, base_hidden, actions)

    monkeypatch.setattr(Scorer, "score", counted)
    evaluate_preferences(model, dataset, batch_size=len(dataset), num_resamples=5)
    answers = [len(pair[f"{side}_ids"]) for pair in dataset for side in ("chosen", "rejected")]
    width = max(len(pair["prompt_ids"]) + len(pair[f"{side}_ids"])
                for pair in dataset for side in ("chosen", "rejected"))
    beyond = [
        len(pair["prompt_ids"]) + len(pair[f"{side}_ids"]) < width
        for pair in dataset for side in ("chosen", "rejected")
    ]
    assert rows == [sum(answers) + (sum(beyond) if alignment == "state" else 0)]


def test_a_plain_model_is_scored_by_its_head_alone():
    plain = tiny_llama()
    with evaluating(plain):
        scorer = Scorer(plain)
        h_a, h_b = scorer.hidden_streams(IDS, torch.ones_like(IDS))
        assert h_a is h_b
        found = scorer.score(h_a[0], h_b[0], IDS[0])
    exact = (h_b[0].double() @ plain.lm_head.weight.double().T).log_softmax(-1)
    torch.testing.assert_close(
        found.base_logprob.double(), exact.gather(1, IDS[0, :, None])[:, 0], atol=3e-5, rtol=3e-6
    )


@pytest.mark.parametrize("form", ["linear", "block"])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_what_training_has_read_is_not_read_again(batch_size, form):
    model, dataset = tiny_adapter(trained=True, form=form), tokenized()
    wanted = evaluate_preferences(model, dataset, batch_size=batch_size, num_resamples=5)
    features = compute_features(model, dataset)
    seen = tokens_run(model)
    found = evaluate_preferences(
        model, dataset, batch_size=batch_size, num_resamples=5, base_states=features.base_states
    )
    assert not any(seen)
    for name, x in vars(wanted.pairs).items():
        if x.dtype.kind == "f":
            np.testing.assert_allclose(
                getattr(found.pairs, name), x, rtol=1e-4, atol=1e-4, err_msg=name
            )


# --- the trunk under a LoRA -------------------------------------------------------------------


def lora(trained=True, layers=None, base=None, **changes):
    base = tiny_llama(num_hidden_layers=3, **changes) if base is None else base
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
    model = QAdapterModel.from_base(base, config)
    if trained:
        torch.manual_seed(1)
        for parameter in model.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens_run(model):
    """How many tokens each block is given, by call."""
    seen = [[] for _ in model.base.model.layers]
    for calls, block in zip(seen, model.base.model.layers, strict=True):
        block.register_forward_pre_hook(
            lambda module, args, calls=calls: calls.append(args[0].shape[0] * args[0].shape[1])
        )
    return seen


def beginnings(dataset):
    texts = [pair["prompt_ids"] + pair[f"{side}_ids"]
             for pair in dataset for side in ("chosen", "rejected")]
    return len({tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)})


@pytest.mark.parametrize("layers, below", [(None, 0), ([1, 2], 1), ([2], 2)])
def test_a_lora_s_streams_run_without_padding_and_share_what_is_not_adapted(layers, below):
    model, dataset = lora(layers=layers), tokenized()
    evaluate_preferences(model, dataset, batch_size=len(dataset), num_resamples=5)  # probes
    seen = tokens_run(model)
    evaluate_preferences(model, dataset, batch_size=len(dataset), num_resamples=5)
    once = beginnings(dataset)
    assert seen == [[once] * (1 if number < below else 2) for number in range(3)]


@pytest.mark.parametrize("layers", [None, [2]])
def test_a_lora_s_scores_are_those_of_the_padded_run(layers, monkeypatch):
    model, dataset = lora(layers=layers), tokenized()
    packed = evaluate_preferences(model, dataset, batch_size=5, num_resamples=5).pairs
    kept = evaluate_retention(model, TEXTS, num_resamples=5).texts
    monkeypatch.setattr(Scorer, "_packs", lambda *_: False)
    padded = evaluate_preferences(model, dataset, batch_size=3, num_resamples=5).pairs
    expected = evaluate_retention(model, TEXTS, num_resamples=5).texts
    close = {"rtol": 1e-4, "atol": 1e-4}
    for found, wanted in ((packed, padded), (kept, expected)):
        for name, x in vars(wanted).items():
            if x.dtype.kind == "f":
                np.testing.assert_allclose(getattr(found, name), x, **close, err_msg=name)


TEXTS = [[5, 6, 7, 8, 9], [5, 6, 7, 10], [11, 12]]


@pytest.mark.parametrize("layers", [None, [2]])
def test_an_untrained_lora_is_the_base_to_the_last_bit(layers):
    model, dataset = lora(trained=False, layers=layers), tokenized()
    for strength in (0.0, 0.5, 1.0):
        pairs = evaluate_preferences(model, dataset, strength=strength, num_resamples=5)
        assert pairs.answer_kl_per_token.value == 0 and pairs.reward_margin.value == 0
        assert not pairs.pairs.chosen_reward.any()
        kept = evaluate_retention(model, TEXTS, strength=strength, num_resamples=5)
        assert kept.kl_per_token.value == 0 and kept.perplexity == kept.perplexity_base


def test_a_lora_at_strength_zero_runs_the_base_alone_for_retention():
    model = lora(layers=[2])
    expected = evaluate_retention(model, TEXTS, num_resamples=5)
    seen = tokens_run(model)
    found = evaluate_retention(model, TEXTS, strength=0.0, num_resamples=5)
    assert found.perplexity == found.perplexity_base == expected.perplexity_base
    assert [len(calls) for calls in seen] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["linear", "block", "lora"])
def test_what_a_memo_remembers_is_not_run_again(kind):
    model = lora() if kind == "lora" else tiny_adapter(trained=True, form=kind)
    dataset = tokenized()
    wanted = evaluate_preferences(model, dataset, num_resamples=5)
    model.trunk_memo = TrunkMemo()
    first = evaluate_preferences(model, dataset, num_resamples=5)
    seen = tokens_run(model)
    again = evaluate_preferences(model, dataset, num_resamples=5)
    assert [len(calls) for calls in seen] == [2 if kind == "lora" else 0] * len(seen)
    for found in (first, again):
        np.testing.assert_allclose(
            found.pairs.chosen_reward, wanted.pairs.chosen_reward, rtol=1e-4, atol=1e-4
        )


def test_pairs_of_a_prompt_are_read_together():
    """Wherever they stand in the data."""
    model, dataset = tiny_adapter(trained=True), tokenized()
    spread = dataset.select([*range(0, 16, 2), *range(1, 16, 2)])
    seen = tokens_run(model)
    for data in (dataset, spread):
        evaluate_preferences(model, data, batch_size=2, num_resamples=5)
    assert sum(seen[0][-8:]) == sum(seen[0][-16:-8])
