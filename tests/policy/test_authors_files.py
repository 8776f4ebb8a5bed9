"""Checkpoints of the authors' published code load as what they are, and do what they were made for.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from authors_run import ARGUMENTS, lora_on, save_run
from hostile.strangers import watching
from oracle import authors_objective
from tiny_models import cli, preference_rows, save_tiny, tiny_llama, write_jsonl

from qadapter import ObjectiveConfig, QAdapterError, QAdapterModel, linear_q_adapter_loss
from qadapter.policy import storage

OTHER_TRAINERS = {k: x for k, x in ARGUMENTS.items() if not k.startswith("alpha_")}
IDS = torch.tensor([[1, 50, 90, 311, 20, 7, 12]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("authors") / "model")


@pytest.fixture
def run(tmp_path, base):
    return save_run(tmp_path / "logs" / "qadapter", base)


@pytest.mark.parametrize("inside", ["", "checkpoint-100"])
def test_the_policy_is_theirs(run, inside):
    """(Q + α₀·log π)/α̃ with the numbers of the run; greedy answers follow it, not Q alone."""
    model = QAdapterModel.from_pretrained(run / inside).eval()
    assert model.objective == ObjectiveConfig(
        alpha_0=0.3, alpha_tilde=0.8, gamma=1.0, chi2_coef=0.05, parametrization="q",
        bootstrap="current", length_normalization="padded", mask_alignment="state",
    )
    q, plain = lora_on(tiny_llama()), tiny_llama()

    def theirs(ids):
        return (q(ids).logits + 0.3 * plain(ids).logits.log_softmax(-1)) / 0.8

    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits.log_softmax(-1), theirs(IDS).log_softmax(-1), atol=1e-5, rtol=0
        )
        expected = IDS
        for _ in range(12):
            expected = torch.cat([expected, theirs(expected)[:, -1:].argmax(-1)], 1)
        written = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False,
            eos_token_id=None,
        )
    assert torch.equal(written, expected)
    assert not torch.equal(
        written, q.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), do_sample=False,
                            max_new_tokens=12, eos_token_id=None)
    )


def test_the_loss_is_theirs(run):
    model = QAdapterModel.from_pretrained(run).eval()
    ids = torch.randint(3, 600, (4, 9))
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for row, (first, last) in enumerate(((3, 8), (4, 6), (3, 5), (4, 9))):
        mask[row, first:last] = True
    with torch.no_grad():
        adapted, frozen = model.hidden_streams(ids)
        ours = linear_q_adapter_loss(
            adapted, frozen, model.get_output_embeddings().weight, ids, mask, model.objective
        ).loss
        q, b = lora_on(tiny_llama())(ids).logits, tiny_llama()(ids).logits
    expected = authors_objective(q, b, ids, mask, alpha_0=0.3, alpha_tilde=0.8, beta=0.05)
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_saved_again_it_is_ours(run, base, tmp_path):
    theirs = QAdapterModel.from_pretrained(run).eval()
    theirs.save_pretrained(tmp_path / "ours")
    saved = storage.read(tmp_path / "ours")
    assert saved.objective == theirs.objective
    assert saved.base.name == str(base)  # which is held against the base from now on
    ours = QAdapterModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    with pytest.raises(QAdapterError, match="but the base given is"):
        QAdapterModel.from_pretrained(tmp_path / "ours", tiny_llama(seed=1))


def test_what_is_beside_it_decides(run, base, tmp_path):
    """Their SFT and DPO trainers write the file too: those adapters are no Q."""
    (run / "training_config.json").write_text(json.dumps(OTHER_TRAINERS))
    for place in (run, run / "checkpoint-100"):
        with pytest.raises(QAdapterError, match="load it in Python with"):
            QAdapterModel.from_pretrained(place)
        dpo = ObjectiveConfig(alpha_0=0.1, alpha_tilde=0.1, chi2_coef=0)
        assert QAdapterModel.from_pretrained(place, objective=dpo).objective == dpo
    (run / "training_config.json").write_text(json.dumps(ARGUMENTS))
    with pytest.raises(QAdapterError, match="trained with another objective"):
        QAdapterModel.from_pretrained(run, objective=ObjectiveConfig.authors())
    # A folder of another name is no part of a run; one that was copied out with the file is whole.
    shutil.copytree(run / "checkpoint-100", run / "best")
    with pytest.raises(QAdapterError, match="load it in Python"):
        QAdapterModel.from_pretrained(run / "best")
    shutil.copytree(run / "checkpoint-100", tmp_path / "checkpoint-100")
    shutil.copy(run / "training_config.json", tmp_path / "checkpoint-100")
    assert storage.read(tmp_path / "checkpoint-100").objective.alpha_0 == 0.3


@pytest.mark.parametrize(("changes", "told"), [
    ({"alpha_0": "a bit"}, "alpha_0 must be a number, got 'a bit'"),
    ({"alpha_tilde": 0}, "alpha_tilde must be positive"),
    ({"beta": None}, "chi2_coef must be a number, got None"),
    ({"gamma": 7}, r"gamma must lie in \[0, 1\]"),
    ("{", "is not JSON"),
])
def test_a_damaged_file_is_named(run, changes, told):
    path = run / "training_config.json"
    path.write_text(changes if isinstance(changes, str) else json.dumps(ARGUMENTS | changes))
    with pytest.raises(QAdapterError, match=rf"training_config\.json.*{told}"):
        QAdapterModel.from_pretrained(run / "checkpoint-100")


def test_without_a_name_of_its_base(run, base):
    path = run / "adapter_config.json"
    path.write_text(json.dumps(
        json.loads(path.read_text()) | {"base_model_name_or_path": None}
    ))
    with pytest.raises(QAdapterError, match="names no base: pass base="):
        QAdapterModel.from_pretrained(run)
    assert QAdapterModel.from_pretrained(run, base)


def test_a_server_takes_several(run, base):
    from qadapter.serving import models
    from qadapter.trunk.loading import load_base, load_tokenizer

    names = {"end": str(run), "earlier": str(run / "checkpoint-100")}
    tokenizer = load_tokenizer(base)
    served = models.load(names, "base", load_base(base), dict.fromkeys([*names, "base"], tokenizer),
                         1.0)
    assert [served.by_name[name].policy.streams for name in names] == [(0,), (1,)]
    assert served.by_name["earlier"].policy.policy.objective.alpha_0 == 0.3


@pytest.mark.slow
def test_commands_take_them(run, base, tmp_path, capsys):
    # Their data files: whole conversations, JSON Lines by another name.
    pairs = write_jsonl(tmp_path / "harmless.test.json", [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        for row in preference_rows(4)
    ])
    ask = ("--prompt", "What is blue?", "--max_new_tokens", 3)
    with watching() as watch:
        assert cli("generate", run, *ask) == 0
    assert watch.opened_in(run) <= {
        ".", "adapter_config.json", "adapter_model.safetensors", "training_config.json",
    }
    assert "of the authors' code: ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.8" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert cli("generate", run / "checkpoint-100", *ask, "--strength", 0.5) == 0
    assert cli("eval", run, "--dataset_name", pairs, "--answer_prompts", 0,
               "--output_dir", tmp_path / "eval") == 0
    assert cli("rewards", run, "--dataset_name", pairs, "--max_pairs", 2,
               "--output_file", tmp_path / "rewards.html") == 0
    capsys.readouterr()
    assert cli("export", run, "--output_dir", tmp_path / "merged") == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and not (tmp_path / "merged").exists()
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert cli("generate", run, *ask) == 2
    assert "names no base: give --base_model_name_or_path" in capsys.readouterr().err
    assert cli("generate", run, *ask, "--base_model_name_or_path", base) == 0
