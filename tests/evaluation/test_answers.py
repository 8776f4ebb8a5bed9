import pytest
import torch
from data.tiny import STRICT, chatml, llama3
from tiny_models import tiny_adapter, tiny_llama

from qadapter import QAdapterError
from qadapter.data.ends import end_of_turn_ids
from qadapter.evaluation import Answer, answer_statistics, generate_answers
from qadapter.evaluation.answers import encode_prompt

PROMPTS = ["What?", "What color is the sky? It is blue, and green.", "Is it hot?"]


@torch.no_grad()
def greedy(forward, prompt_ids, ends, steps):
    ids = list(prompt_ids)
    for _ in range(steps):
        ids.append(int(forward(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt_ids):]


@pytest.mark.parametrize("strength", [None, 0.0, 0.5])
def test_batched_greedy_answers_are_those_of_each_prompt_alone(strength):
    model, tokenizer = tiny_adapter(trained=True), chatml()
    answers = generate_answers(
        model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=2, strength=strength
    )
    ends = end_of_turn_ids(model, tokenizer)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = encode_prompt(tokenizer, prompt)
        expected = greedy(lambda x: model(x, strength=strength).logits, ids, ends, 12)
        assert answer.token_ids == expected
        assert answer.ended == (expected[-1] in ends)
    assert model.policy.strength == 1.0


def test_sampling_is_seeded_and_leaves_the_generator_alone():
    model, tokenizer = tiny_adapter(trained=True), chatml()
    state = torch.get_rng_state()
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5}
    first, again, other = (
        generate_answers(model, tokenizer, PROMPTS, seed=seed, **options) for seed in (1, 1, 2)
    )
    assert first == again and first != other
    assert torch.equal(state, torch.get_rng_state())


def test_the_end_of_turn_ends_an_answer_also_where_it_is_not_eos():
    """Llama 3's template ends a turn with a token that is not the tokenizer's eos."""
    tokenizer, model = llama3(), tiny_llama()
    model.generation_config.eos_token_id = None
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert end_of_turn_ids(model, tokenizer) == sorted({tokenizer.eos_token_id, eot})


def test_prompts_of_every_kind():
    tokenizer = llama3()
    as_text, as_chat = (
        encode_prompt(tokenizer, p) for p in ("What?", [{"role": "user", "content": "What?"}])
    )
    assert as_text == as_chat
    assert as_text.count(tokenizer.bos_token_id) == 1
    assert encode_prompt(tokenizer, as_text) == as_text
    plain = llama3(template=None)
    assert encode_prompt(plain, "What?") == plain("What?")["input_ids"]
    with pytest.raises(QAdapterError, match="no chat template"):
        encode_prompt(plain, [{"role": "user", "content": "What?"}])
    with pytest.raises(QAdapterError, match="can't render a prompt: roles must alternate"):
        encode_prompt(llama3(template=STRICT), [{"role": "user", "content": "What?"}] * 2)
    for empty in ("", "  ", []):
        with pytest.raises(QAdapterError, match="prompt is empty"):
            encode_prompt(tokenizer, empty)


def test_a_plain_model_has_no_strength():
    for strength in (0.5, [0.5] * len(PROMPTS)):
        with pytest.raises(QAdapterError, match="no"):
            generate_answers(tiny_llama(), chatml(), PROMPTS, strength=strength)


def test_every_prompt_may_have_its_own_strength():
    """In one batch what each has alone, whatever the order they are sorted to."""
    model, options = tiny_adapter(trained=True), {"max_new_tokens": 6, "batch_size": 8}
    dials = (0.0, 1.0, 2.0)
    alone = [generate_answers(model, chatml(), PROMPTS, strength=s, **options) for s in dials]
    assert alone[0] != alone[1] != alone[2]
    together = generate_answers(
        model, chatml(), list(PROMPTS) * 3, strength=[s for s in dials for _ in PROMPTS], **options
    )
    assert together == [answer for answers in alone for answer in answers]


def test_statistics():
    answers = [
        Answer("The sky is the sky.", [1, 2, 3, 4], True), Answer("the sky", [1, 2], False)
    ]
    stats = answer_statistics(answers)
    assert stats["answers"] == 2
    assert (stats["tokens_mean"], stats["words_mean"], stats["words_median"]) == (3, 3.5, 3.5)
    assert stats["share_ended"] == 0.5
    # the sky is the sky. | the sky: words {the, sky, is, sky.} of 7; pairs 4 of 5; triples 3 of 3.
    assert stats["distinct_1"] == 4 / 7
    assert stats["distinct_2"] == 4 / 5
    assert stats["distinct_3"] == 1.0
    assert answer_statistics([]) == {"answers": 0}
