"""The retention term against KL(π‖π̃) written out, and its place in the trainer."""

from __future__ import annotations

import copy
import dataclasses
import json

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from training_tiny import build_model, build_pairs, build_tokenizer
from transformers import TrainerCallback

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError
from qadapter.data import tokenize_preferences
from qadapter.data.passages import BUILT_IN, passages, read_held_to
from qadapter.training import QAdapterConfig, QAdapterTrainer, own_samples
from qadapter.training.retention import RetentionStates, as_texts

TEXTS = ["w1 w2 w3 w4 w5", "w9 w8 w7", "w30 w31 w32 w33 w34 w35 w36"]
OBJECTIVES = (
    ObjectiveConfig(),
    ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.7),
    ObjectiveConfig(alpha_0=0.2, alpha_tilde=1.5, parametrization="q"),
)


ADAPTERS = {
    "head": AdapterConfig(form="mlp", rank=4),
    "block": AdapterConfig(form="block", rank=4),
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


def _moved(kind, objective=None):
    """A float64 model whose adapter does something."""
    model = build_model(copy.deepcopy(ADAPTERS[kind]), objective, dtype=torch.float64)
    if kind == "head":
        model.adapter.double()
    for parameter in model.adapter.parameters():
        parameter.data = parameter.data.double()
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=("default", "policy", "q"))
def test_divergence_and_its_gradient_equal_the_definition(kind, objective):
    """KL(π‖π̃) from full logits, by autograd, at states of several texts, one of them twice."""
    model, tokenizer = _moved(kind, objective), build_tokenizer()
    states = RetentionStates(model, tokenizer, TEXTS)
    assert len(states) == sum(len(text.split()) - 1 for text in TEXTS)
    picked = torch.tensor([0, 3, 3, 7])
    ours = states.divergence(model, picked)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    adapted, base = (
        torch.cat([streams[i][0, :-1] for streams in map(model.hidden_streams, ids)])[picked]
        for i in range(2)
    )
    logpi = model.head(base).log_softmax(-1)
    logp = model.policy_logits(base, adapted).log_softmax(-1)
    theirs = (logpi.exp() * (logpi - logp)).sum(-1)
    assert ours.min() > 1e-3  # there is something to compare
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    parameters = list(model.adapter.parameters())
    for mine, right in zip(
        torch.autograd.grad(ours.sum(), parameters, retain_graph=True),
        torch.autograd.grad(theirs.sum(), parameters), strict=True,
    ):
        torch.testing.assert_close(mine, right, atol=1e-10, rtol=1e-8)


def test_a_lora_runs_the_texts_that_were_drawn():
    """Whole texts until there are enough states, the last one cut: the mean over just those."""
    model = _moved("lora")
    states = RetentionStates(model, build_tokenizer(), TEXTS)
    found = states.loss(model, 5, seed=3)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(3)).tolist()
    drawn = [s for i in order for s in range(states.offsets[i], states.offsets[i + 1])][:5]
    torch.testing.assert_close(found, states.divergence(model, torch.tensor(drawn)).mean())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_prompt_is_read_and_not_held_to(kind):
    model, prompt, answer = _moved(kind), [5, 6, 7], [8, 9]
    whole = RetentionStates(model, None, [([], prompt + answer)])
    answers = RetentionStates(model, None, [(prompt, answer)])
    assert (len(whole), len(answers)) == (4, 2)
    torch.testing.assert_close(
        answers.divergence(model, torch.tensor([0, 1])),
        whole.divergence(model, torch.tensor([2, 3])),
    )


def test_an_untrained_adapter_has_not_drifted():
    model = build_model()
    states = RetentionStates(model, build_tokenizer(), TEXTS)
    assert states.divergence(model, torch.arange(len(states))).abs().max() < 1e-6


class _Losses(TrainerCallback):
    def __init__(self):
        self.kl = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "retention_kl" in logs:
            self.kl.append(logs["retention_kl"])


def _train(tmp_path, adapter=None, texts=TEXTS, **arguments):
    losses = _Losses()
    settings = {
        "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "seed": 0,
        "per_device_train_batch_size": 8, "num_train_epochs": 4, "retention_coef": 0.0,
    }
    model = build_model(adapter)
    trainer = QAdapterTrainer(
        model, QAdapterConfig(**{**settings, **arguments}), train_dataset=build_pairs(16),
        processing_class=build_tokenizer(), callbacks=[losses],
        retention_dataset=texts if arguments.get("retention_coef") else None,
    )
    trainer.train()
    states = RetentionStates(model, build_tokenizer(), TEXTS)
    drift = states.divergence(model, torch.arange(len(states))).mean().item()
    return losses.kl, drift, model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_term_keeps_the_policy_near_the_base_where_it_is_told_to(tmp_path, kind):
    adapter = ADAPTERS[kind]
    _, free, _ = _train(tmp_path, copy.deepcopy(adapter), learning_rate=0.1)
    logged, held, _ = _train(
        tmp_path, copy.deepcopy(adapter), learning_rate=0.1, retention_coef=300.0
    )
    assert len(logged) == 8 and logged[0] < 1e-6 < logged[-1]
    assert held < free / 2


def test_the_term_does_not_depend_on_how_a_step_is_split(tmp_path):
    _, _, whole = _train(tmp_path, retention_coef=5.0)
    _, _, split = _train(
        tmp_path, retention_coef=5.0, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    for mine, other in zip(whole.adapter.parameters(), split.adapter.parameters(), strict=True):
        # Eight Adam steps of float32 sums taken in another order.
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_own_answers_are_asked_for_once(tmp_path, monkeypatch):
    """The base's samples, not the trained policy's; a second run finds them in the cache."""
    cache = tmp_path / "cache"
    options = {"texts": own_samples.OWN, "retention_coef": 5.0, "feature_cache_dir": str(cache)}
    first, _, model = _train(tmp_path, **options)
    [file] = cache.glob("samples-*.json")
    assert first[0] < 1e-6 < first[-1]
    prompts = list(dict.fromkeys(build_pairs(16)["prompt"]))
    assert len(json.loads(file.read_text())["answers"]) == len(prompts)

    def refuse(*args, **kwargs):
        raise AssertionError("sampled again")

    monkeypatch.setattr(own_samples, "generate", refuse)
    second, _, _ = _train(tmp_path, **options)
    assert second == first
    ids = [build_tokenizer()(prompts[0])["input_ids"]]
    with pytest.raises(AssertionError, match="sampled again"):  # other prompts are not in it
        own_samples.load_or_sample(model, ids, build_tokenizer(), cache_dir=cache)


def test_own_samples_are_the_bases(tmp_path):
    """A trained adapter does not change them, and the model is left as it was."""
    prompts, tokenizer = [[5, 6, 7], [8, 9]], build_tokenizer()
    fresh, moved = build_model(), build_model()
    torch.nn.init.normal_(moved.adapter.up.weight, std=3.0)
    moved.set_policy(strength=2.0)
    moved.train()
    expected = own_samples.load_or_sample(fresh, prompts, tokenizer, cache_dir=tmp_path / "a")
    found = own_samples.load_or_sample(moved, prompts, tokenizer, cache_dir=tmp_path / "b")
    assert found == expected and [prompt for prompt, _ in found] == prompts
    assert all(answer for _, answer in found)
    assert moved.policy.strength == 2.0 and moved.training


@pytest.fixture
def held(tmp_path):
    """A trainer's coefficient, how many texts it is held to, and the lines it says."""

    def settle(model, train=None, texts=None, tokenizer=None, **arguments):
        lines = []
        settings = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True, **arguments}
        trainer = QAdapterTrainer(
            model, QAdapterConfig(**settings), train_dataset=train, processing_class=tokenizer,
            retention_dataset=texts, say=lines.append,
        )
        if train is not None:
            trainer.read_base()
        states = trainer._retention_states
        return trainer.args.retention_coef, states and len(states.texts), "\n".join(lines)

    return settle


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_is_held_to_the_passages_unless_told_otherwise(held, kind):
    pairs, tokenizer, count = build_pairs(4), build_tokenizer(), len(passages(held_to=True))

    def found(**arguments):
        model = build_model(copy.deepcopy(ADAPTERS[kind]))
        return held(model, pairs, tokenizer=tokenizer, **arguments)[:2]

    assert found() == (30.0, count)
    assert found(retention_coef=5.0) == (5.0, count)
    assert found(retention_coef=0.0) == (0.0, None)
    assert found(texts=TEXTS) == (30.0, len(TEXTS))
    assert found(texts=own_samples.OWN) == (10.0, len(set(pairs["prompt"])))


def test_where_the_passages_cannot_be_read_nothing_is_held_to_and_that_is_said(held, tmp_path):
    pairs, tokenizer = build_pairs(4), build_tokenizer()
    ids = tokenize_preferences(pairs, tokenizer)
    build_model().base.config.save_pretrained(tmp_path)  # and nothing else

    def alone():
        model = build_model()
        model.base_identity = dataclasses.replace(model.base_identity, name=str(tmp_path))
        return model

    # No tokenizer, and the model's name leads to none; prompts may be asked about all the same.
    assert held(alone(), ids)[:2] == (0.0, None)
    assert "held to no texts: tokenizer of " in held(alone(), ids)[2]
    assert held(alone(), ids, own_samples.OWN)[0] == 10.0
    capped = build_model()
    capped.head = dataclasses.replace(capped.head, softcap=30.0)
    coef, _, lines = held(capped, pairs, tokenizer=tokenizer)
    assert coef == 0.0 and "held to no texts: retention_coef needs a head without" in lines
    coef, _, lines = held(build_model(), pairs, tokenizer=tokenizer, max_length=100)
    assert coef == 30.0 and "held to no texts" not in lines
    # Asked for, it is an error.
    with pytest.raises(QAdapterError, match="tokenizer of "):
        held(alone(), ids, retention_coef=5.0)
    with pytest.raises(QAdapterError, match="softcap"):
        held(capped, pairs, tokenizer=tokenizer, retention_coef=5.0)
    assert held(build_model())[0] == 0.0  # nothing is trained


def test_what_cannot_be_used_is_named(tmp_path):
    arguments = QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, retention_coef=1.0)
    features = QAdapterTrainer(
        build_model(), arguments, processing_class=build_tokenizer()
    ).features(build_pairs(4))
    with pytest.raises(QAdapterError, match="needs training data with prompts"):
        QAdapterTrainer(
            build_model(), arguments, processing_class=build_tokenizer(), train_dataset=features,
            retention_dataset=own_samples.OWN,
        )
    without = QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, retention_coef=0.0)
    with pytest.raises(QAdapterError, match="retention_coef above 0"):
        QAdapterTrainer(
            build_model(), without, processing_class=build_tokenizer(), retention_dataset=TEXTS
        )
    with pytest.raises(QAdapterError, match="retention_coef must be"):
        QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, retention_coef=-1.0)
    with pytest.raises(QAdapterError, match="two tokens or more"):
        RetentionStates(build_model(), build_tokenizer(), ["w1", ""])
    with pytest.raises(QAdapterError, match="row 1 is int"):
        as_texts(["w1 w2", 3])


WITH_TEXT = {"text": ["w1 w2", "w3"], "label": [1, 2]}


@pytest.mark.parametrize("data", [
    WITH_TEXT, pd.DataFrame(WITH_TEXT), Dataset.from_dict(WITH_TEXT),
    Dataset.from_dict(WITH_TEXT).to_iterable_dataset(), WITH_TEXT["text"], iter(WITH_TEXT["text"]),
])
def test_texts_of_whatever_has_the_column(data):
    assert as_texts(data) == WITH_TEXT["text"]


def test_built_in_passages_have_a_name(tmp_path):
    assert as_texts(BUILT_IN) == read_held_to(BUILT_IN) == passages(held_to=True)
    file = tmp_path / "texts.txt"
    file.write_text("one\ntwo\n")
    assert read_held_to(str(file)) == ["one", "two"]
    assert as_texts(["built-in"]) == ["built-in"]  # a text that says so


@pytest.mark.parametrize(("texts", "message"), [
    ("texts.txt", "is a name, .texts.txt.: read_texts"),
    (["a", "b \ud83d"], "retention text 1 holds"),
    ({"body": ["a"]}, "needs a column text, it has body"), ([None], "row 0 is NoneType"),
])
def test_what_is_no_text_is_named(texts, message):
    with pytest.raises(QAdapterError, match=message):
        as_texts(texts)


def test_texts_end_where_the_base_s_positions_do():
    model, tokenizer = build_model(), build_tokenizer()
    positions = model.config.max_position_embeddings
    texts = [" ".join(["w1"] * (positions + 9)), "w1 w2"]
    states = RetentionStates(model, tokenizer, texts, max_length=None)
    assert [len(text) for text in states.texts] == [positions, 2]
