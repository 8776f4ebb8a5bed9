"""What an evaluation that fools itself would get wrong: an untrained adapter, shuffled labels."""

import json

import numpy as np
import pytest
import torch
from data.tiny import chatml
from peft import LoraConfig
from tiny_models import preference_rows, save_tiny, tiny_llama, tokenized, write_jsonl

from qadapter import AdapterConfig, QAdapterConfig, QAdapterModel, QAdapterTrainer
from qadapter.cli import main
from qadapter.data import as_preferences, tokenize_preferences
from qadapter.evaluation import evaluate_preferences, evaluate_retention, generate_answers

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
ADAPTERS = {
    "linear": AdapterConfig(form="linear", rank=4), "mlp": AdapterConfig(form="mlp", rank=4),
    "block": AdapterConfig(form="block", rank=4), "lora": LORA,
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_of_any_kind_is_the_base_to_the_last_digit(name, dtype):
    base = tiny_llama().to(dtype)
    plain_pairs = evaluate_preferences(base, tokenized(), num_resamples=20)
    plain_texts = evaluate_retention(base, [[5, 9, 300, 41, 7], [12, 80, 2]], num_resamples=20)
    model = QAdapterModel.from_base(base, ADAPTERS[name])
    pairs = evaluate_preferences(model, tokenized(), num_resamples=20)
    np.testing.assert_array_equal(pairs.pairs.chosen_policy_logp, pairs.pairs.chosen_base_logp)
    np.testing.assert_array_equal(
        pairs.pairs.chosen_base_logp, plain_pairs.pairs.chosen_base_logp
    )
    assert pairs.preference_accuracy == (0.5, 0.5, 0.5)
    assert pairs.answer_kl_per_token == (0.0, 0.0, 0.0)
    texts = evaluate_retention(model, [[5, 9, 300, 41, 7], [12, 80, 2]], num_resamples=20)
    assert texts.kl_per_token == (0.0, 0.0, 0.0) and texts.top1_agreement == (1.0, 1.0, 1.0)
    assert texts.perplexity == texts.perplexity_base == plain_texts.perplexity_base
    prompts = ["What?", "Is it blue?"]
    assert generate_answers(model, chatml(), prompts, max_new_tokens=8) == generate_answers(
        base, chatml(), prompts, max_new_tokens=8
    )


def trained(tmp_path, train, held_out):
    model = QAdapterModel.from_base(tiny_llama(), AdapterConfig(form="linear", rank=8))
    arguments = QAdapterConfig(
        output_dir=str(tmp_path), max_steps=60, learning_rate=1e-2, report_to="none",
        per_device_train_batch_size=16, save_strategy="no", disable_tqdm=True, use_cpu=True,
        retention_coef=0.0,
    )
    trainer = QAdapterTrainer(
        model, arguments, train_dataset=as_preferences(train), processing_class=chatml()
    )
    trainer.train()
    dataset = tokenize_preferences(as_preferences(held_out), chatml()).dataset
    return evaluate_preferences(model, dataset, num_resamples=20)


@pytest.mark.slow
def test_training_on_shuffled_labels_learns_a_coin(tmp_path):
    """And on true labels it learns them, or this test could not fail."""
    rows = preference_rows(440)
    true = trained(tmp_path, rows[:200], rows[200:])
    assert true.preference_accuracy.value > 0.95
    rng = np.random.default_rng(0)
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    shuffled = trained(tmp_path, rows[:200], rows[200:])
    # 240 fair coins: five standard deviations are 0.16.
    assert abs(shuffled.preference_accuracy.value - 0.5) < 0.16
    assert shuffled.random_baseline == 0.5


def test_eval_of_an_untrained_adapter_shows_its_base_and_both_baselines(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(12))
    (tmp_path / "texts.txt").write_text("The sky is blue.\nYes, no, maybe, never.\n")
    QAdapterModel.from_base(str(tmp_path / "model"), ADAPTERS["mlp"]).save_pretrained(
        tmp_path / "run"
    )
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in (
            "eval", tmp_path / "run", "--dataset_name", tmp_path / "pairs.jsonl",
            "--retention_file", tmp_path / "texts.txt", "--answer_prompts", 3, "--answer_tokens",
            4, "--bootstrap_resamples", 20, "--output_dir", tmp_path / "out",
        )])
    assert end.value.code == 0
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert found["preference_accuracy"] == 0.5
    assert found["preference_accuracy_policy"] == found["preference_accuracy_base"]
    for retention in found["retention"].values():
        assert retention["kl_per_token"] == retention["kl_policy_base_per_token"] == 0
        assert retention["top1_agreement"] == 1
        assert retention["perplexity"] == retention["perplexity_base"]
    assert set(found["retention"]) == {"texts.txt", "the base's own answers"}
    assert found["answers"]["base"] == found["answers"]["customised"]
    # Under the table on the screen and in the report: what needs no model.
    for text in (capsys.readouterr().out, (tmp_path / "out/report.md").read_text()):
        text = " ".join(text.split())
        for part in ("the longer answer wins 0.000", "the shorter 1.000", "a coin 0.500"):
            assert part in text
