"""A token that the model has no embedding for is named before any batch is run."""

import numpy as np
import pytest
import torch
from data.tiny import chatml
from tiny_models import preference_rows, tiny_llama

from qadapter import AdapterConfig, QAdapterModel
from qadapter.data import check_pairs, padding_id, tokenize_preferences
from qadapter.data.vocabulary import num_tokens
from qadapter.errors import QAdapterError
from qadapter.evaluation import (
    evaluate_preferences,
    evaluate_retention,
    generate_answers,
)
from qadapter.evaluation.judges import HiddenStateJudge
from qadapter.evaluation.token_rewards import reward_answers
from qadapter.training import QAdapterConfig, QAdapterTrainer

SIZE = len(chatml())


@pytest.fixture
def model():
    model = QAdapterModel.from_base(tiny_llama(vocab_size=SIZE), AdapterConfig(rank=4))
    # Any batch at all would be one too many.
    model.base.model.register_forward_pre_hook(lambda *args: pytest.fail("the model was run"))
    return model


@pytest.fixture
def tokenizer():
    tokenizer = chatml()
    tokenizer.add_tokens(["<plan>", "<act>"])
    return tokenizer


def trainer(model, tokenizer, tmp_path, dataset=None, **kwargs):
    args = QAdapterConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2,
        report_to=[], disable_tqdm=True, use_cpu=True, feature_cache_dir=str(tmp_path / "cache"),
    )
    dataset = preference_rows(4) if dataset is None else dataset
    return QAdapterTrainer(
        model, args, train_dataset=dataset, processing_class=tokenizer, **kwargs
    )


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_an_added_token_is_named_with_its_row(model, tokenizer, tmp_path, side, split):
    rows = preference_rows(6)
    rows[4][side][0]["content"] += "<act>"
    data = {"dataset": rows} if split == "train" else {"eval_dataset": rows}
    place = {"prompt": "prompt"}.get(side, f"{side} answer")
    with pytest.raises(QAdapterError, match=(
        rf"the {split} data: the {place} of row 4 holds the token '<act>' \(id {SIZE + 1}\), and "
        rf"the model knows {SIZE} tokens.*resize_token_embeddings\({SIZE + 2}\)"
    )):
        trainer(model, tokenizer, tmp_path, **data)


@pytest.mark.parametrize("token", [SIZE, SIZE + 99, 2**31 - 1])
def test_ids_given_as_such(model, tmp_path, token):
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}] * 3
    rows.append({"prompt_ids": [5], "chosen_ids": [token], "rejected_ids": [8]})
    with pytest.raises(QAdapterError, match=rf"row 3 holds the token id {token}.*base's own token"):
        trainer(model, chatml(), tmp_path, rows)


def test_rows_keep_their_numbers(model, tokenizer):
    rows = preference_rows(8)
    rows[6]["chosen"][0]["content"] = "<plan>"
    rows[1]["chosen"] = rows[1]["rejected"]  # dropped
    data = tokenize_preferences(rows, tokenizer).dataset
    for dataset in (data, data.select([5, 4, 3])):
        with pytest.raises(QAdapterError, match=r"row 6 holds the token '<plan>'"):
            check_pairs(dataset, model, tokenizer)
    check_pairs(data.select([0, 1, 2]), model, tokenizer)


def test_whatever_reads_tokens_says_so(model, tokenizer):
    rows = preference_rows(4)
    rows[2]["rejected"][0]["content"] = "<plan>"
    pairs = tokenize_preferences(rows, tokenizer).dataset
    says = rf"holds the token ('<plan>' \()?id {SIZE}"
    with pytest.raises(QAdapterError, match=rf"rejected answer of row 2 {says}"):
        evaluate_preferences(model, pairs)
    with pytest.raises(QAdapterError, match=f"retention text 1 {says}"):
        evaluate_retention(model, ["What color?", "I think <plan>"], tokenizer)
    with pytest.raises(QAdapterError, match=r"retention text 0 holds the token id -1"):
        evaluate_retention(model, [np.array([1, -1, 2])])
    for prompts in (["a", "<plan>"], ["a", [5, SIZE]]):
        with pytest.raises(QAdapterError, match=f"prompt 1 {says}"):
            generate_answers(model, tokenizer, prompts)
    with pytest.raises(QAdapterError, match=f"answer 1 {says}"):
        reward_answers(model, tokenizer, "a", [[1], [2, SIZE]])
    with pytest.raises(QAdapterError, match=f"judged answer 0 {says}"):
        HiddenStateJudge(model, tokenizer).features(["a"], ["<plan>"])


def test_retention_texts_of_a_trainer(model, tokenizer, tmp_path, monkeypatch):
    held = trainer(model, tokenizer, tmp_path, retention_dataset=["What color?", "So <act>"])
    with pytest.raises(QAdapterError, match=r"retention text 1 holds the token '<act>'"):
        held.train()


def test_padding_that_was_added_is_no_obstacle(tmp_path):
    tokenizer = chatml()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = QAdapterModel.from_base(tiny_llama(vocab_size=SIZE), AdapterConfig(rank=4))
    assert padding_id(model, tokenizer) == padding_id(model, None) == 0
    assert padding_id(model, chatml()) == chatml().pad_token_id
    held = trainer(model, tokenizer, tmp_path)
    held.train()
    assert np.isfinite(held.state.log_history[-1]["train_loss"])
    answers = generate_answers(model, tokenizer, ["a", "a longer one"], max_new_tokens=4)
    assert answers == generate_answers(model, chatml(), ["a", "a longer one"], max_new_tokens=4)


def test_padded_embeddings_and_resized_ones_are_right(tokenizer):
    rows = preference_rows(4)
    rows[0]["chosen"][0]["content"] = "<plan><act>"
    pairs = tokenize_preferences(rows, tokenizer).dataset
    base = tiny_llama(vocab_size=SIZE)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for other in (base, tiny_llama(vocab_size=SIZE + 64)):
        check_pairs(pairs, other, tokenizer)
    assert num_tokens(base) == SIZE + 2


def test_a_head_narrower_than_the_embeddings_counts():
    base = tiny_llama(vocab_size=SIZE, tie_word_embeddings=False)
    base.set_output_embeddings(torch.nn.Linear(32, SIZE - 5, bias=False))
    assert num_tokens(base) == SIZE - 5
