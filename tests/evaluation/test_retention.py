import numpy as np
import pytest
import torch
from data.tiny import chatml
from tiny_models import tiny_adapter, tiny_llama

from qadapter import ObjectiveConfig, QAdapterError
from qadapter.evaluation import evaluate_retention

TEXTS = [[5, 9, 300, 41, 7], [12, 80, 80, 2, 599, 31, 77, 64], [3, 4], [8]]


def exact(model, ids, strength=1.0):
    """KL(π‖π̃), KL(π̃‖π), log π, log π̃ of one text in float64; [T − 1] each."""
    h_a, h_b = model.hidden_streams(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    weight = model.head.weight.double()
    a, b = (h[0, :-1].double() @ weight.T for h in (h_a, h_b))
    o = model.objective
    base = torch.log_softmax(b, -1)
    q = o.adapter_coef * a + o.base_coef * b
    trained = torch.log_softmax((q + o.alpha_0 * base) / o.alpha_tilde, -1)
    policy = torch.log_softmax(strength * trained + (1 - strength) * base, -1)
    tokens = torch.tensor(ids[1:])[:, None]
    return (
        (base.exp() * (base - policy)).sum(-1), (policy.exp() * (policy - base)).sum(-1),
        base.gather(1, tokens)[:, 0], policy.gather(1, tokens)[:, 0],
        base.argmax(-1) == policy.argmax(-1),
    )


@pytest.mark.parametrize("strength", [1.0, 0.4, 1.7])
@pytest.mark.parametrize("objective", [
    ObjectiveConfig(), ObjectiveConfig(parametrization="q", alpha_0=0.5, alpha_tilde=2.0)
])
@torch.no_grad()
def test_against_float64(objective, strength):
    model = tiny_adapter(trained=True, form="mlp", objective=objective)
    result = evaluate_retention(model, TEXTS, strength=strength, batch_size=2, num_resamples=10)
    parts = [torch.cat(x) for x in zip(*(exact(model, t, strength) for t in TEXTS[:3]),
                                       strict=True)]
    kl, reverse, base, policy, same = (x.double().mean().item() for x in parts)
    # Float32 logits of size ten: some 1e-6 a log-probability.
    assert result.kl_per_token.value == pytest.approx(kl, rel=1e-4, abs=2e-6)
    assert result.kl_policy_base_per_token.value == pytest.approx(reverse, rel=1e-4, abs=2e-6)
    assert result.perplexity_base.value == pytest.approx(np.exp(-base), rel=1e-5)
    assert result.perplexity.value == pytest.approx(np.exp(-policy), rel=1e-5)
    assert result.top1_agreement.value == same
    # A text of one token has nothing to score.
    assert (result.num_texts, result.num_tokens) == (3, 4 + 7 + 1)


@pytest.mark.parametrize("model", [tiny_adapter(trained=False),
                                   tiny_adapter(trained=False).to(torch.bfloat16)])
def test_an_untrained_adapter_is_the_base_to_the_last_digit(model):
    result = evaluate_retention(model, TEXTS, num_resamples=20)
    assert result.kl_per_token == (0.0, 0.0, 0.0)
    assert result.kl_policy_base_per_token == (0.0, 0.0, 0.0)
    assert result.top1_agreement == (1.0, 1.0, 1.0)
    assert result.perplexity == result.perplexity_base


def test_a_plain_model_has_the_perplexity_of_a_base_and_no_divergence():
    plain = evaluate_retention(tiny_llama(), TEXTS, num_resamples=20)
    adapter = evaluate_retention(tiny_adapter(trained=True), TEXTS, num_resamples=20)
    assert plain.perplexity_base == adapter.perplexity_base != adapter.perplexity
    assert plain.kl_per_token is None and plain.top1_agreement is None
    assert "perplexity" not in plain.as_dict()


def test_strength_zero_is_the_base_to_the_last_digit():
    result = evaluate_retention(tiny_adapter(trained=True), TEXTS, strength=0.0, num_resamples=20)
    assert result.kl_per_token == (0.0, 0.0, 0.0)
    assert result.perplexity == result.perplexity_base


def test_prompts_are_read_and_not_scored_and_long_texts_cut():
    model = tiny_adapter(trained=True)
    whole = evaluate_retention(model, TEXTS[:2], num_resamples=5).texts
    part = evaluate_retention(model, TEXTS[:2], prompt_lengths=[3, 0], num_resamples=5).texts
    assert part.tokens.tolist() == [2, 7]
    assert part.base_logp[1] == pytest.approx(whole.base_logp[1], rel=1e-6)
    assert 0 > part.base_logp[0] > whole.base_logp[0]
    assert evaluate_retention(model, TEXTS[:2], max_length=3, num_resamples=5).num_tokens == 4


def test_strings_are_tokenized_and_need_a_tokenizer():
    result = evaluate_retention(tiny_llama(), ["The sky is blue.", "Yes."], chatml())
    assert result.num_texts == 2
    with pytest.raises(QAdapterError, match="need a tokenizer"):
        evaluate_retention(tiny_llama(), ["The sky is blue."])
    with pytest.raises(QAdapterError, match="no text has a token"):
        evaluate_retention(tiny_llama(), [[4], []])
