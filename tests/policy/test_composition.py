"""Composed adapters are the weighted sum of their Q-functions."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from naive import (
    LENGTH,
    ROWS,
    NaivePolicy,
    batched_in_small_steps,
    left_padded,
    stock,
    uncached,
)
from tiny_models import batches_continuously, tiny_base
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.policy.composition import compose

EQUAL = ObjectiveConfig(alpha_0=0.7, alpha_tilde=0.7)
POLICY = ObjectiveConfig(alpha_0=0.5, alpha_tilde=2.0)
AUTHORS = ObjectiveConfig.authors()


def heads(*objectives, form="linear", seed=0):
    base, models = tiny_base("phi"), []
    for number, objective in enumerate(objectives):
        model = QAdapterModel.from_base(base, AdapterConfig(form=form, rank=3 + number), objective)
        torch.manual_seed(seed + number)
        torch.nn.init.normal_(model.adapter.up.weight, std=0.3)
        models.append(model.eval())
    return models


def q_of(model, inputs):
    h_a, h_b = model.hidden_streams(**inputs)
    c = model.objective
    return c.adapter_coef * model.head(h_a) + c.base_coef * model.head(h_b)


@pytest.mark.parametrize("form", ["linear", "mlp"])
@pytest.mark.parametrize(
    "objectives, weights, target",
    [
        ((EQUAL, EQUAL), (0.4, 1.3), None),
        ((POLICY, POLICY), (0.4, 0.6), None),
        ((AUTHORS, AUTHORS, AUTHORS), (2.0, -1.5, 0.5), None),
        ((EQUAL, ObjectiveConfig()), (0.4, 1.3), ObjectiveConfig(alpha_0=0.2, alpha_tilde=0.2)),
        ((POLICY, AUTHORS), (0.4, 0.4), AUTHORS),
    ],
)
def test_q_is_the_weighted_sum(objectives, weights, target, form):
    models, inputs = heads(*objectives, form=form), left_padded(ROWS)
    composed = compose(models, weights, target)
    expected = sum(w * q_of(m, inputs) for w, m in zip(weights, models, strict=True))
    torch.testing.assert_close(q_of(composed, inputs), expected, atol=1e-4, rtol=1e-4)
    c = composed.objective
    base = composed.head(composed.base_hidden(**inputs))
    policy = ((expected + c.alpha_0 * base) / c.alpha_tilde).log_softmax(-1)
    torch.testing.assert_close(
        composed(**inputs).logits.log_softmax(-1), policy, atol=1e-4, rtol=0
    )


def test_it_generates_and_saves_like_any_other(tmp_path):
    composed = compose(heads(EQUAL, EQUAL), (0.5, 0.8))
    composed.save_pretrained(tmp_path)
    loaded = QAdapterModel.from_pretrained(tmp_path, tiny_base("phi"))
    inputs = left_padded(ROWS)
    assert torch.equal(loaded.generate(**inputs, **LENGTH), composed.generate(**inputs, **LENGTH))
    assert composed.adapter_config.rank == 7


def test_one_adapter_alone_is_itself():
    (model,) = heads(POLICY)
    inputs = left_padded(ROWS)
    torch.testing.assert_close(compose([model], [1.0])(**inputs).logits, model(**inputs).logits)


def test_what_does_not_add_up_is_refused():
    one, two = heads(POLICY, POLICY)
    with pytest.raises(QAdapterError, match="weights sum to 1"):
        compose([one, two], [0.5, 0.8])
    with pytest.raises(QAdapterError, match="a weight for each of 2"):
        compose([one, two], [1.0])
    with pytest.raises(QAdapterError, match="finite"):
        compose([one, two], [float("nan"), 1.0])
    with pytest.raises(QAdapterError, match="linear and mlp"):
        compose([one, *heads(POLICY, form="mlp")], [0.5, 0.5])
    with pytest.raises(QAdapterError, match='"block" add to the states before the final norm'):
        compose(heads(POLICY, POLICY, form="block"), [0.5, 0.5])
    with pytest.raises(QAdapterError, match="objectives differ"):
        compose([one, *heads(AUTHORS)], [0.5, 0.5])
    other = QAdapterModel.from_base(tiny_base("phi", seed=5), AdapterConfig(rank=2), POLICY)
    with pytest.raises(QAdapterError, match="head differ"):
        compose([one, other], [0.5, 0.5])
    capped = QAdapterModel.from_base(tiny_base("gemma2"), AdapterConfig(rank=2))
    with pytest.raises(QAdapterError, match="softcap"):
        compose([capped], [1.0])
    lora = QAdapterModel.from_base(tiny_base("phi"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(QAdapterError, match="LoRA and linear"):
        compose([lora, one], [0.5, 0.5], POLICY)
    with pytest.raises(QAdapterError, match="composed again"):
        compose([compose([one], [1.0])], [1.0])
    biased = QAdapterModel.from_base(
        tiny_base("phi"), peft.LoraConfig(target_modules=["q_proj"]), POLICY
    )
    with pytest.raises(QAdapterError, match="weights sum to 1"):  # twice the head's bias
        compose([biased, biased], [1.0, 1.0])


def test_heads_are_switched_for_each_row():
    models, inputs = heads(POLICY, EQUAL), left_padded(ROWS)
    composed = compose(models, [0.0, 1.0], ObjectiveConfig())
    check_rows(composed, models, inputs)
    with pytest.raises(ValueError, match="n = 2, got 3"):
        composed(**inputs, strength=torch.ones(3, 3))
    with pytest.raises(ValueError, match="one adapter"):
        models[0](**inputs, strength=torch.ones(3, 2))


# --- LoRA: a stream for each ----------------------------------------------------------------------

LORAS = {
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "mlp": {"r": 2, "target_modules": ["down_proj"], "lora_alpha": 4},
    "dora": {"r": 2, "target_modules": ["q_proj", "k_proj"], "use_dora": True},
    "norm": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["norm"]},
    "weight": {"r": 2, "target_modules": [], "target_parameters": ["q_proj.weight"]},
    "second": {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "third": {"r": 2, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [2, 3]},
}


def loras(*objectives, kinds=("lora", "mlp", "lora"), architecture="llama", **changes):
    """Models, each on a base of its own, and the same adapters in stock PEFT."""
    models, theirs, base = [], [], tiny_base(architecture, **changes)
    for number, (objective, kind) in enumerate(zip(objectives, kinds, strict=False)):
        config = peft.LoraConfig(**LORAS[kind])
        stock = peft.get_peft_model(copy.deepcopy(base), config).eval()
        torch.manual_seed(number)
        for parameter in stock.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model = QAdapterModel.from_base(copy.deepcopy(base), config, objective).eval()
        model.adapter.load_state_dict(peft.get_peft_model_state_dict(stock))
        models.append(model)
        theirs.append(stock)
    return models, theirs, base


class NaiveSum(NaivePolicy):
    """z of Σ wᵢ·qᵢ by whole models; with a strength [B, n], π^(1−Σsᵢ)·Π π̃ᵢ^sᵢ."""

    def __init__(self, adapted, base, parts, weights, objective):
        super().__init__(base, base, objective)
        self.models, self.parts = torch.nn.ModuleList(adapted), parts
        self.weights = weights

    @torch.no_grad()
    def forward(self, input_ids, attention_mask=None, position_ids=None, strength=1.0, **unused):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        b = self.base(**inputs).logits
        log_pi = b.log_softmax(-1)
        q = []
        for model, c in zip(self.models, self.parts, strict=True):
            a = model(**inputs).logits
            q.append(c.alpha_tilde * a - c.alpha_0 * b if c.parametrization == "policy" else a)
        if isinstance(strength, torch.Tensor) and strength.dim() == 2:
            logits = log_pi.clone()
            for s, one, c in zip(strength.unbind(1), q, self.parts, strict=True):
                z = ((one + c.alpha_0 * log_pi) / c.alpha_tilde).log_softmax(-1)
                logits += s.view(-1, 1, 1) * (z - log_pi)
            return CausalLMOutputWithPast(logits=logits)
        c = self.objective
        total = sum(w * one for w, one in zip(self.weights, q, strict=True))
        z = ((total + c.alpha_0 * log_pi) / c.alpha_tilde).log_softmax(-1)
        w = torch.as_tensor(strength, dtype=torch.float32).reshape(-1, 1, 1)
        return CausalLMOutputWithPast(logits=w * z + (1 - w) * log_pi)


def check_rows(composed, models, inputs):
    """A row of zeros is the base, a single 1 that adapter's own policy, in one batch."""
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    real = inputs["attention_mask"].bool()
    logits = composed(**inputs, strength=rows).logits.log_softmax(-1)
    answers = composed.generate(**inputs, **LENGTH, strength=rows)
    alone = ((models[0], 0.0), (models[0], 1.0), (models[1], 1.0))
    for row, (model, strength) in enumerate(alone):
        theirs = model(**inputs, strength=strength).logits.log_softmax(-1)
        torch.testing.assert_close(
            logits[row][real[row]], theirs[row][real[row]], atol=1e-4, rtol=0
        )
        expected = model.generate(**inputs, **LENGTH, strength=strength)
        assert answers[row].tolist() == expected[row].tolist()
        base = models[0](**inputs, strength=0.0).logits.log_softmax(-1)
        assert row == 0 or (theirs - base)[row][real[row]].abs().max() > 0.1


SUMS = [
    ((EQUAL, EQUAL), (0.4, 1.3), None),
    ((POLICY, POLICY), (0.4, 0.6), None),
    ((AUTHORS, AUTHORS, AUTHORS), (2.0, -1.5, 1.0), None),
    ((POLICY, AUTHORS), (0.4, 0.9), AUTHORS),
    ((AUTHORS, EQUAL), (0.7, 0.5), POLICY),
]


@pytest.mark.parametrize("objectives, weights, target", SUMS)
def test_q_of_loras_is_the_weighted_sum(objectives, weights, target):
    models, theirs, base = loras(*objectives)
    composed, inputs = compose(models, weights, target), left_padded(ROWS)
    naive = NaiveSum(theirs, base, objectives, weights, composed.objective)
    real = inputs["attention_mask"].bool()
    dials = torch.tensor([[0.3, 0.9, 0.0], [1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])[:, :len(models)]
    for strength in (1.0, 0.0, 1.7, torch.tensor([0.0, 1.0, 0.4]), dials):
        ours = composed(**inputs, strength=strength).logits.log_softmax(-1)
        expected = naive(**inputs, strength=strength).logits.log_softmax(-1)
        torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=0)
        for settings in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            settings = LENGTH | settings | {"strength": strength}
            assert torch.equal(
                composed.generate(**inputs, **settings),
                naive.generate(**inputs, **uncached(settings)),
            )
    torch.testing.assert_close(
        q_of(composed, inputs)[real],
        sum(w * q_of(m, inputs) for w, m in zip(weights, models, strict=True))[real],
        atol=1e-4, rtol=1e-4,
    )


@pytest.mark.parametrize(
    "kinds", [("lora", "dora"), ("dora", "lora"), ("norm", "norm"), ("mlp", "weight")]
)
def test_adapters_of_other_kinds_compose(kinds):
    objectives, weights = (AUTHORS, EQUAL), (0.7, 0.5)
    models, theirs, base = loras(*objectives, kinds=kinds)
    composed, inputs = compose(models, weights, POLICY), left_padded(ROWS)
    naive = NaiveSum(theirs, base, objectives, weights, POLICY)
    real = inputs["attention_mask"].bool()
    for strength in (0.8, torch.tensor([[0.3, 0.9], [1.0, 0.0], [0.0, 1.0]])):
        torch.testing.assert_close(
            composed(**inputs, strength=strength).logits.log_softmax(-1)[real],
            naive(**inputs, strength=strength).logits.log_softmax(-1)[real], atol=1e-4, rtol=0,
        )


def test_blocks_below_all_of_the_loras_run_once():
    weights, inputs = (0.4, 0.9), left_padded(ROWS)
    models, theirs, base = loras(AUTHORS, AUTHORS, kinds=("third", "second"), num_hidden_layers=4)
    assert models[0].adapter.split.first_block == 2
    models[0].adapter.add(models[1].adapter_config, models[1].adapter.state_dict())
    assert models[0].adapter.split.first_block == 1
    models, *_ = loras(AUTHORS, AUTHORS, kinds=("third", "second"), num_hidden_layers=4)
    composed = compose(models, weights)
    naive = NaiveSum(theirs, base, (AUTHORS, AUTHORS), weights, AUTHORS)
    real = inputs["attention_mask"].bool()
    rows = [[] for _ in base.model.layers]
    for block, seen in zip(composed.base.model.layers, rows, strict=True):
        block.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
    for strength in (1.3, torch.tensor([[0.3, 0.9], [1.0, 0.0], [0.0, 0.0]])):
        composed(**inputs, strength=strength)  # the first one probes
        for seen in rows:
            seen.clear()
        ours = composed(**inputs, strength=strength).logits.log_softmax(-1)
        assert rows == [[3], [9], [9], [9]]
        torch.testing.assert_close(
            ours[real], naive(**inputs, strength=strength).logits.log_softmax(-1)[real],
            atol=1e-4, rtol=0,
        )
        for settings in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            settings = LENGTH | settings | {"strength": strength}
            assert torch.equal(
                composed.generate(**inputs, **settings),
                naive.generate(**inputs, **uncached(settings)),
            )
    expected = composed.hidden_streams(**inputs)
    with torch.no_grad():
        found = composed.hidden_streams(**inputs)
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours[real], wanted[real])


def test_loras_are_switched_for_each_row():
    models, _, _ = loras(POLICY, AUTHORS)
    check_rows(compose(models, (0.5, 0.5), POLICY), models, left_padded(ROWS))


def test_only_streams_with_a_weight_run():
    models, _, _ = loras(POLICY, POLICY)
    inputs, rows = left_padded(ROWS), []
    for weights, runs in (((0.4, 0.6), [6, 3]), ((0.4, 0.7), [9, 3]), ((1.0, 0.0), [3, 3])):
        composed = compose(models, weights)
        composed.base.model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]),
            with_kwargs=True,
        )
        rows.clear()
        composed(**inputs)
        composed(**inputs, strength=0.0)
        assert rows == runs


@batches_continuously
def test_composed_loras_batch_continuously():
    models, theirs, base = loras(POLICY, POLICY)
    composed, weights = compose(models, (0.4, 0.9)), (0.4, 0.9)
    naive = NaiveSum(theirs, base, (POLICY, POLICY), weights, POLICY)
    stock(lambda: batched_in_small_steps(base, ROWS[:1], 1))
    for row, answer in zip(ROWS, batched_in_small_steps(composed, ROWS, 6), strict=True):
        expected = naive.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False)
        assert answer == expected[0, len(row):].tolist()


def test_loras_are_left_as_they_are_and_share_the_base():
    models, _, _ = loras(POLICY, POLICY)
    inputs = left_padded(ROWS)
    before = [m(**inputs, strength=0.7).logits for m in models]
    composed = compose(models, (0.4, 0.6))
    composed(**inputs)
    for model, logits in zip(models, before, strict=True):
        assert torch.equal(model(**inputs, strength=0.7).logits, logits)
    shared = models[0].get_input_embeddings().weight
    assert composed.get_input_embeddings().weight is shared
    assert not any(p.requires_grad for p in composed.parameters())


def test_composed_loras_are_saved_with_their_weights(tmp_path):
    models, _, base = loras(POLICY, AUTHORS)
    composed, inputs = compose(models, (0.4, 0.9), AUTHORS), left_padded(ROWS)
    composed.save_pretrained(tmp_path)
    loaded = QAdapterModel.from_pretrained(tmp_path, copy.deepcopy(base))
    assert loaded.weights == (0.4, 0.9) and loaded.objective == AUTHORS
    for strength in (0.6, torch.tensor([[0.3, 0.9], [1.0, 0.0], [0.0, 0.0]])):
        assert torch.equal(loaded(**inputs, strength=strength).logits,
                           composed(**inputs, strength=strength).logits)
    alone = QAdapterModel.from_pretrained(tmp_path / "adapter-1", copy.deepcopy(base)).eval()
    assert torch.equal(alone(**inputs).logits, models[1](**inputs).logits)
    with pytest.raises(QAdapterError, match="frozen"):
        QAdapterModel.from_pretrained(tmp_path, base, is_trainable=True)
    (tmp_path / "adapter-1" / "adapter_model.safetensors").unlink()
    with pytest.raises(QAdapterError, match=r"adapter-1/adapter_model\.safetensors is missing"):
        QAdapterModel.from_pretrained(tmp_path, base)


def test_no_single_model_is_several_streams(tmp_path):
    models, _, _ = loras(POLICY, POLICY)
    composed = compose(models, (0.4, 0.6))
    with pytest.raises(QAdapterError, match="2 adapters in the trunk"):
        composed.export(tmp_path / "out")
    with pytest.raises(QAdapterError, match="can't be merged"):
        composed.merge_adapter()
    models[0].merge_adapter()
    with pytest.raises(QAdapterError, match=r"unmerge_adapter\(\) first"):
        compose(models, (0.4, 0.6))


def test_peft_says_what_it_can_not_hold_together():
    models, _, base = loras(POLICY)
    other = QAdapterModel.from_base(base, peft.LoHaConfig(r=2, target_modules=["q_proj"]), POLICY)
    with pytest.raises(QAdapterError, match="can't hold these adapters together"):
        compose([*models, other], (0.4, 0.6))
