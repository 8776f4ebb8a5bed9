"""Judges trained on preferences, and reward models."""

import numpy as np
import pytest
import torch
from data.tiny import chatml
from tiny_models import preference_rows, save_tiny, tiny_adapter, tiny_llama
from transformers import LlamaConfig, LlamaForSequenceClassification

from qadapter import QAdapterError
from qadapter.data import PromptEncoder, as_preferences
from qadapter.evaluation.judges import (
    HiddenStateJudge,
    PreferenceTexts,
    WordPresenceJudge,
    pair_accuracy,
    preference_texts,
)
from qadapter.evaluation.judges.reward_model import SequenceClassificationJudge
from qadapter.evaluation.judges.texts import prompt_text
from qadapter.evaluation.judges.trained import PENALTIES, fit_bradley_terry


def texts(count=60, shuffle=None):
    """"Yes, …." is better than "I think so, … and …."."""
    found = preference_texts(as_preferences(preference_rows(count)))
    if shuffle is None:
        return found
    swap = np.random.default_rng(shuffle).random(len(found.prompts)) < 0.5
    pairs = [(b, a) if s else (a, b)
             for a, b, s in zip(found.chosen, found.rejected, swap, strict=True)]
    return found._replace(chosen=[a for a, _ in pairs], rejected=[b for _, b in pairs])


def test_pairs_as_texts():
    rows = [
        {"prompt": "What?", "chosen": " Yes.", "rejected": "No."},
        {"prompt": "Why?", "chosen": "So.", "rejected": "So. "},
        {"prompt": "How?", "chosen": None, "rejected": "So."},
    ]
    found = preference_texts(as_preferences(rows))
    assert found[:3] == (["What?"], ["Yes."], ["No."])
    chat = texts(2)
    assert chat.chosen[0] == "Yes, blue." and chat.prompts[0][0]["role"] == "user"
    assert chat.prompt_ids[0] == chat.prompt_ids[1]
    ids = as_preferences([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}])
    assert preference_texts(ids, chatml()).prompts == [[5, 6]]
    with pytest.raises(QAdapterError, match="without their tokenizer"):
        preference_texts(ids)
    with pytest.raises(QAdapterError, match="no pair can be judged"):
        preference_texts(as_preferences(rows[1:]))
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    assert prompt_text(turns) == "user: A\n\nassistant: B"
    assert prompt_text(turns[:1]) == prompt_text("A") == "A"
    with pytest.raises(QAdapterError, match="token ids"):
        prompt_text([1, 2])


def test_judges_read_tools_and_calls():
    look = {"name": "look", "arguments": '{"city": "Rome"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": look}]}
    asked = [{"role": "user", "content": [{"type": "text", "text": "Hot?"}]}, call]
    assert prompt_text(asked) == 'user: Hot?\n\nassistant: look({"city": "Rome"})'
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert prompt_text({"prompt": asked[:1], "tools": tools}) == (
        'tools: [{"type": "function", "function": {"name": "look"}}]\n\nuser: Hot?'
    )
    other = {**call, "tool_calls": [{"function": look | {"arguments": '{"city": "Oslo"}'}}]}
    row = {"prompt": asked[:1], "chosen": [call], "rejected": [other], "tools": tools}
    found = preference_texts(as_preferences([row]))
    assert found.chosen == ['look({"city": "Rome"})'] and found.prompts[0]["tools"] == tools


def test_plain_text_is_asked_as_it_was_trained_on():
    """Not as a user's turn, though the tokenizer has a chat template."""
    rows = [{"prompt": "Hot? ", "chosen": "Yes.", "rejected": "No."}]
    [prompt] = preference_texts(as_preferences(rows)).prompts
    assert PromptEncoder(chatml())(prompt) == chatml()("Hot? ")["input_ids"]


def judges():
    return HiddenStateJudge(tiny_llama(), chatml(), batch_size=16), WordPresenceJudge()


@pytest.mark.parametrize("which", [0, 1])
def test_a_trained_judge_ranks_pairs_it_has_not_seen(which):
    whole, judge = texts(80), judges()[which]
    train, test = (PreferenceTexts(*(column[part] for column in whole))
                   for part in (slice(0, 60), slice(60, 80)))
    judge.fit(train)
    assert pair_accuracy(judge, test).value > 0.9
    assert judge.cross_validated_accuracy > 0.9 and judge.num_pairs == 60
    assert judge.penalty in PENALTIES
    # A pair the other way round gets the other verdict.
    verdicts = judge.compare(test.prompts, test.chosen, test.rejected)
    assert np.array_equal(judge.compare(test.prompts, test.rejected, test.chosen), 1 - verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_on_shuffled_labels_a_judge_is_a_coin(which):
    """Over 160 pairs and five shuffles the standard error is about 0.02; folds of one model are
    not independent, so five are allowed."""
    accuracies = []
    for seed in range(5):
        judge = judges()[which]
        judge.fit(texts(160, shuffle=seed))
        accuracies.append(judge.cross_validated_accuracy)
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("model", [
    tiny_llama(), tiny_adapter(trained=True), tiny_adapter(trained=True, form="mlp"),
])
@torch.no_grad()
def test_hidden_states_are_the_bases_averaged_over_the_answer(model):
    tokenizer = chatml()
    judge = HiddenStateJudge(model, tokenizer, batch_size=2)
    prompts, answers = ["What?", "Is it blue?", "What?"], ["Yes, blue.", "No.", ""]
    found = judge.features(prompts, answers)
    for prompt, answer, row in zip(prompts, answers, found, strict=True):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(rendered + answer, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        hidden = tiny_llama().model(torch.tensor([ids])).last_hidden_state[0]
        # Nothing answered: the state at which an answer would begin.
        expected = hidden[start:].mean(0) if answer else hidden[start - 1]
        assert torch.allclose(row, expected.double(), atol=1e-5)


def test_long_texts_keep_the_answers_start_and_the_prompts_end():
    judge = HiddenStateJudge(tiny_llama(), chatml(), max_length=12)
    whole, _ = HiddenStateJudge(tiny_llama(), chatml())._encode("What? " * 9, "blue red " * 9)
    ids, start = judge._encode("What? " * 9, "blue red " * 9)
    answer = chatml()("blue red " * 9, add_special_tokens=False)["input_ids"]
    assert (len(ids), start) == (12, 6)
    assert ids == whole[len(whole) - len(answer) - 6 :][:12]


def test_repeating_a_word_is_worth_nothing_to_the_word_judge():
    judge = WordPresenceJudge()
    judge.fit(texts(60))
    once, often, unknown = judge.scores(["x"] * 3, ["Yes", "yes yes YES yes", "zebra"])
    assert once == often > 0 and unknown == 0


def test_too_few_pairs_train_no_judge():
    with pytest.raises(QAdapterError, match="at least 20 pairs on 5 prompts"):
        WordPresenceJudge().fit(texts(18))
    same = texts(40)._replace(prompt_ids=["one"] * 40)
    with pytest.raises(QAdapterError, match="got 40 on 1"):
        WordPresenceJudge().fit(same)


def test_the_fit_is_the_minimum_of_what_it_says():
    torch.manual_seed(0)
    x = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1.0, 30.0, 0.01])
    x[:, 0] += 0.7
    weight, penalty, _ = fit_bradley_terry(x, range(200))
    scale = x.square().mean(0).sqrt()
    weight = weight.clone().requires_grad_()
    loss = torch.nn.functional.softplus(-(x @ weight)).mean()
    loss = loss + penalty / 2 * (scale * weight).square().sum()
    [gradient] = torch.autograd.grad(loss, weight)
    # In units in which the features have the size 1; LBFGS stops at 1e-7.
    assert (gradient / scale).abs().max() < 1e-5
    sparse, same, _ = fit_bradley_terry(x.to_sparse_coo(), range(200))
    assert same == penalty and torch.allclose(sparse, weight, rtol=1e-3)


# --- reward models ------------------------------------------------------------------------------


def save_reward_model(folder, template, labels=1):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, num_labels=labels,
        pad_token_id=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = chatml()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [True, False])
@torch.no_grad()
def test_a_reward_models_logit_is_the_score(tmp_path, template):
    folder = save_reward_model(tmp_path / "rm", template)
    judge = SequenceClassificationJudge(str(folder), batch_size=2)
    prompts = ["What?", [{"role": "user", "content": "Is it blue?"}], "Hot?"]
    answers = ["Yes, blue.", "No.", "Maybe, and never always."]
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = chatml()
    for prompt, answer, score in zip(
        prompts, answers, judge.scores(prompts, answers), strict=True
    ):
        question = prompt if isinstance(prompt, str) else prompt[0]["content"]
        ids = tokenizer(question, answer)["input_ids"] if not template else tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                tokenize=False,
            ), add_special_tokens=False,
        )["input_ids"]
        assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)
    assert judge.name == "rm (reward model)"


def test_a_reward_model_reads_an_answer_in_the_turn_that_the_prompt_begins(tmp_path):
    judge = SequenceClassificationJudge(str(save_reward_model(tmp_path / "rm", True)))
    asked = [{"role": "user", "content": "Hot?"}]
    begun = [*asked, {"role": "assistant", "content": "Yes, "}]
    assert judge.scores([begun], ["blue."]) == judge.scores([asked], ["Yes, blue."])


def test_a_reward_models_template_may_refuse(tmp_path):
    folder = save_reward_model(tmp_path / "rm", True)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    with pytest.raises(QAdapterError, match=r"rm .*can't render an answer: no system here"):
        SequenceClassificationJudge(str(folder)).scores(["What?"], ["Yes."])


def test_reward_models_that_are_none(tmp_path):
    with pytest.raises(QAdapterError, match="has 3 labels; a reward model has one"):
        SequenceClassificationJudge(str(save_reward_model(tmp_path / "three", True, labels=3)))
    with pytest.raises(QAdapterError, match="nowhere can't be loaded"):
        SequenceClassificationJudge(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("labels", [1, 2])
def test_a_plain_language_model_is_no_reward_model(tmp_path, labels):
    """Its head would be drawn at random."""
    save_tiny(tmp_path / "plain")
    config = LlamaConfig.from_pretrained(tmp_path / "plain", num_labels=labels)
    config.save_pretrained(tmp_path / "plain")
    with pytest.raises(QAdapterError, match=r"plain is not a reward model .*plain language model"):
        SequenceClassificationJudge(str(tmp_path / "plain"))


def test_reward_models_whose_weights_are_damaged(tmp_path):
    folder = save_reward_model(tmp_path / "rm", True)
    LlamaConfig.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    with pytest.raises(QAdapterError, match="rm can't be loaded"):
        SequenceClassificationJudge(str(folder))
    [weights] = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(QAdapterError, match="rm can't be loaded"):
        SequenceClassificationJudge(str(folder))


