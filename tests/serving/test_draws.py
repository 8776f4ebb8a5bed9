"""Draws of one batch, and the text of tokens as they come."""

import pytest
import torch
from data.tiny import chatml
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qadapter.serving.answers import TextOfTokens
from qadapter.serving.sampling import Drawing, Sampling, _filtered, draw


def filtered_by_transformers(scores, sampling):
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores


@pytest.mark.parametrize("vocabulary", [40, 5000])
@pytest.mark.parametrize("sampling", [
    Sampling(0.7), Sampling(2.0, 0.9), Sampling(1.0, 0.3, 5), Sampling(1.5, 1.0, 3),
    Sampling(1.0, 0.999), Sampling(1.0, 1e-6), Sampling(1.0, 1.0, 10**6), Sampling(50.0, 0.95),
])
def test_the_filters_are_transformers(sampling, vocabulary):
    torch.manual_seed(0)
    scores = torch.randn(3, vocabulary) * 4
    ours = _filtered(scores.clone(), [sampling] * 3).softmax(-1)
    capped = Sampling(sampling.temperature, sampling.top_p, min(sampling.top_k, vocabulary))
    theirs = filtered_by_transformers(scores.clone(), capped).softmax(-1)
    # Sums of softmaxes are rounded in another order; top-p may cut a token earlier at its edge.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_every_request_is_drawn_as_if_it_were_alone():
    torch.manual_seed(0)
    logits = torch.randn(4, 300)
    samplings = [Sampling(1.0, seed=1), Sampling(0.0), Sampling(0.5, 0.8, seed=2),
                 Sampling(1.3, seed=3, top_logprobs=2)]
    together = draw(logits, [Drawing(s) for s in samplings])
    for i, sampling in enumerate(samplings):
        [alone] = draw(logits[i : i + 1], [Drawing(sampling)])
        assert alone.token == together[i].token
    assert together[1].token == logits[1].argmax()
    assert together[0].logprob is None
    logprobs = logits[3].log_softmax(-1)
    assert together[3].logprob == pytest.approx(float(logprobs[together[3].token]), abs=1e-6)
    assert [token for token, _ in together[3].top] == logprobs.topk(2).indices.tolist()


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    sampling = Sampling(1.0, seed=0)
    drawing, counts = Drawing(sampling), torch.zeros(3)
    for _ in range(4000):
        counts[draw(logits, [drawing])[0].token] += 1
    # Four standard deviations of a share of 4,000 draws: 4·√(1/4/4000).
    assert (counts / 4000 - logits[0].softmax(-1)).abs().max() < 0.032


def test_the_penalty_for_repetitions_is_transformers():
    torch.manual_seed(0)
    prompt, drawing = [3, 5, 5], Drawing(Sampling(0.0, repetition_penalty=1.7), [3, 5, 5])
    other = Drawing(Sampling(0.0), prompt)
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    for _ in range(12):
        logits = torch.randn(2, 9)
        expected = penalty(torch.tensor([prompt]), logits[:1].clone()).argmax(-1)
        penalised, plain = draw(logits, [drawing, other])
        assert penalised.token == expected and plain.token == logits[1].argmax()
        prompt.append(penalised.token)


def test_penalties_count_the_tokens_of_the_answer():
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    drawing = Drawing(Sampling(0.0, presence_penalty=0.2, top_logprobs=1), [0, 0])
    found = [draw(logits, [drawing])[0] for _ in range(3)]
    assert [one.token for one in found] == [0, 1, 0]  # the prompt's don't count; 1.8 against 1.9
    # What is told is the policy's own.
    assert found[1].logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]))
    drawing = Drawing(Sampling(0.0, frequency_penalty=0.6))
    assert [draw(logits, [drawing])[0].token for _ in range(5)] == [0, 1, 0, 1, 0]
    drawing = Drawing(Sampling(0.0, frequency_penalty=1.2))
    assert [draw(logits, [drawing])[0].token for _ in range(5)] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("spoil", [float("nan"), float("-inf"), float("inf")])
def test_a_row_that_cant_be_drawn_is_alone_in_it(spoil):
    logits = torch.zeros(3, 8)
    logits[1] = spoil
    samplings = [Sampling(0.0), Sampling(1.0, seed=1), Sampling(1.0, seed=1, top_logprobs=0)]
    found = draw(logits, [Drawing(s) for s in samplings])
    assert found[1] is None and found[0] is not None and found[2].logprob is not None


def told(text, stops=(), tokenizer=None):
    """The pieces of a text, token by token."""
    tokenizer = tokenizer or chatml()
    of = TextOfTokens(tokenizer, stops)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(of.add(token))
        if of.stopped:
            break
    pieces.append(of.end())
    return pieces, of.stopped


@pytest.mark.parametrize("text", ["What is blue?", "né – ✓ 😀 ok", "  two  spaces ", "\n\nx", ""])
def test_pieces_join_to_the_text(text):
    pieces, stopped = told(text)
    assert "".join(pieces) == text and not stopped
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("stops, wanted", [
    (["blue"], "What is "), (["W"], ""), (["zzz", "is", "blue"], "What "), (["?"], "What is blue"),
    (["blue? "], "What is blue?"), (["e?!"], "What is blue?"), (["t is b"], "Wha"),
])
def test_stops_over_the_ends_of_tokens(stops, wanted):
    pieces, stopped = told("What is blue?", stops)
    assert "".join(pieces) == wanted
    assert stopped == (wanted != "What is blue?")


def test_bytes_that_never_make_a_character_are_told_at_last():
    tokenizer = chatml()
    of = TextOfTokens(tokenizer, ())
    [first, *_] = tokenizer("😀", add_special_tokens=False).input_ids
    pieces = [of.add(first) for _ in range(40)]
    assert any(pieces)
    assert "".join(pieces) + of.end() == tokenizer.decode([first] * 40)
