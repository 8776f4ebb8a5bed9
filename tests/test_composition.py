"""Composed adapters are the weighted sum of their Q-functions."""

from __future__ import annotations

import peft
import pytest
import torch
from naive import LENGTH, ROWS, left_padded
from tiny_models import tiny_base

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.composition import compose

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
    with pytest.raises(QAdapterError, match="objectives differ"):
        compose([one, *heads(AUTHORS)], [0.5, 0.5])
    other = QAdapterModel.from_base(tiny_base("phi", seed=5), AdapterConfig(rank=2), POLICY)
    with pytest.raises(QAdapterError, match="head differ"):
        compose([one, other], [0.5, 0.5])
    capped = QAdapterModel.from_base(tiny_base("gemma2"), AdapterConfig(rank=2))
    with pytest.raises(QAdapterError, match="softcap"):
        compose([capped], [1.0])
    lora = QAdapterModel.from_base(tiny_base(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(QAdapterError, match="head adapters"):
        compose([lora], [1.0])
