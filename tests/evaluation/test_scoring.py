"""Scores of states: beside the definition in float64, whatever the head; and what they cost."""

import pytest
import torch
from tiny_models import tiny_adapter, tiny_base, tiny_llama, tokenized

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.evaluation import evaluate_preferences, evaluate_retention, scoring
from qadapter.evaluation.scoring import Scorer, evaluating
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
