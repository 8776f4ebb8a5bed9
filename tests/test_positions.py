"""A sequence longer than a model's table of positions is named before any batch is run."""

import pytest
import torch
from data.tiny import chatml
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    XGLMConfig,
)

from qadapter import AdapterConfig, QAdapterModel
from qadapter.data import check_pairs, tokenize_preferences
from qadapter.data.vocabulary import num_positions
from qadapter.errors import QAdapterError
from qadapter.evaluation import evaluate_preferences, evaluate_retention, generate_answers
from qadapter.evaluation.judges import HiddenStateJudge
from qadapter.evaluation.token_rewards import reward_answers
from qadapter.training import QAdapterConfig, QAdapterTrainer, own_samples

MOST = 32
SIZE = len(chatml())
ROWS = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}] * 4


def row(prompt=2, chosen=1, rejected=1):
    return {"prompt_ids": [5] * prompt, "chosen_ids": [7] * chosen, "rejected_ids": [8] * rejected}


@pytest.fixture
def unhooked():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(GPT2Config(
        n_positions=MOST, n_embd=16, n_layer=2, n_head=2, vocab_size=SIZE, bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    ))
    return QAdapterModel.from_base(base, AdapterConfig(rank=4))


@pytest.fixture
def model(unhooked):
    # Any batch at all would be one too many.
    unhooked.base.transformer.register_forward_pre_hook(lambda *x: pytest.fail("the model was run"))
    return unhooked


def trainer(model, tmp_path, rows, eval_rows=None, **changes):
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "retention_coef": 0.0}
    args = QAdapterConfig(
        output_dir=str(tmp_path / "run"), report_to=[], disable_tqdm=True, use_cpu=True,
        feature_cache_dir=str(tmp_path / "cache"), **settings | changes,
    )
    return QAdapterTrainer(
        model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=chatml()
    )


@pytest.mark.parametrize("config, table", [
    (GPT2Config(n_positions=MOST, n_embd=16, n_layer=1, n_head=2, vocab_size=97), True),
    (OPTConfig(max_position_embeddings=MOST, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16,
               num_hidden_layers=1, num_attention_heads=2, vocab_size=97), True),
    (GPTJConfig(n_positions=MOST, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=97),
     True),
    (LlamaConfig(max_position_embeddings=MOST, hidden_size=16, intermediate_size=16,
                 num_hidden_layers=1, num_attention_heads=2, vocab_size=97), False),
    # The sinusoids are made anew where they end; a bias by distance has no end.
    (XGLMConfig(max_position_embeddings=MOST, d_model=16, num_layers=1, attention_heads=2,
                ffn_dim=16, vocab_size=97), False),
    (BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=97), False),
], ids=lambda x: getattr(x, "model_type", str(x)))
def test_a_model_is_said_to_end_where_it_does(config, table):
    model = AutoModelForCausalLM.from_config(config)
    assert num_positions(model) == (MOST if table else None)
    model(torch.ones(1, MOST, dtype=torch.int64))
    if table:
        with pytest.raises(IndexError):
            model(torch.ones(1, MOST + 1, dtype=torch.int64))
    else:
        model(torch.ones(1, MOST + 1, dtype=torch.int64))


@pytest.mark.parametrize("long", [row(MOST, 1), row(2, MOST - 1), row(2, 1, MOST - 1)])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_pairs_are_named_by_their_row(model, tmp_path, long, split):
    rows = [[*ROWS, long, row()], None] if split == "train" else [ROWS, [*ROWS, long]]
    with pytest.raises(QAdapterError, match=(
        rf"the {split} data: row 4 has 33 tokens, and the model has positions for 32.*max_length 32"
    )):
        trainer(model, tmp_path, *rows)


def test_pairs_of_a_stream_are_named_by_their_row(model, tmp_path):
    stream = Dataset.from_list([*ROWS, row(2, MOST)]).to_iterable_dataset()
    with pytest.raises(QAdapterError, match=r"the dataset: row 4 has 34 tokens.*max_length 32"):
        trainer(model, tmp_path, stream)


def test_as_long_as_it_goes_it_trains(unhooked, tmp_path):
    rows = [*ROWS, row(MOST - 2, 2), row(2, MOST - 2, 3)]
    check_pairs(tokenize_preferences(rows, chatml()).dataset, unhooked)
    trainer(unhooked, tmp_path, rows, max_steps=3).train()


def test_whatever_reads_tokens_says_so(model):
    tokenizer = chatml()
    says = "has 3[34] tokens, and the model has positions for 32"
    with pytest.raises(QAdapterError, match=f"row 1 {says}"):
        evaluate_preferences(
            model, tokenize_preferences([*ROWS[:1], row(2, MOST)], tokenizer).dataset
        )
    with pytest.raises(QAdapterError, match=f"retention text 1 {says}"):
        evaluate_retention(model, [[5] * 8, [5] * 33])
    with pytest.raises(QAdapterError, match=f"prompt and answer 1 {says}"):
        reward_answers(model, tokenizer, [5] * 30, [[1], [2] * 3])
    with pytest.raises(QAdapterError, match=r"judged answer 0 has .* positions for 32.*max_length"):
        HiddenStateJudge(model, tokenizer).features(["a"], ["one two three " * 20])
    with pytest.raises(QAdapterError, match=(
        r"prompt 1 has 20 tokens and 13 to come, and the model has positions for 32.*new tokens"
    )):
        generate_answers(model, tokenizer, [[5] * 19, [5] * 20], max_new_tokens=13)


def test_completions_while_training_have_room(model, tmp_path):
    logging = {"log_completions": True, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(QAdapterError, match=(
        r"log_completions: held-out prompt 0 has 2 tokens and 31 to come.*positions for 32"
    )):
        trainer(model, tmp_path, ROWS, ROWS, max_completion_length=31, **logging)


def test_prompts_without_room_for_an_own_answer_are_left_out(unhooked, tmp_path, monkeypatch):
    monkeypatch.setattr(own_samples, "MAX_NEW_TOKENS", 8)
    prompts = [[5] * (MOST - 8), [5] * (MOST - 7), [5, 6]]
    samples = own_samples.load_or_sample(unhooked, prompts, chatml(), cache_dir=tmp_path)
    assert [prompt for prompt, _ in samples] == [prompts[0], prompts[2]]
    with pytest.raises(QAdapterError, match=r"no prompt leaves room for 8 tokens.*32 positions"):
        own_samples.load_or_sample(unhooked, prompts[1:2], chatml(), cache_dir=tmp_path)
