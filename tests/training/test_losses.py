"""The numbers of a batch against the objective's own, computed from logits."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from training_tiny import build_model, build_pairs

from qadapter import ObjectiveConfig, q_adapter_loss
from qadapter.data import PreferenceCollator, tokenize_preferences
from qadapter.training.features import FeatureCollator, compute_features
from qadapter.training.losses import Totals, averages, batch_loss, count


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_has_the_loss_and_metrics_of_its_logits(tokenizer, cached):
    objective = ObjectiveConfig(alpha_0=0.7, alpha_tilde=1.3, gamma=0.9)
    model = build_model(objective=objective)
    torch.nn.init.normal_(model.adapter.up.weight)
    dataset = tokenize_preferences(build_pairs(5), tokenizer).dataset
    padded = PreferenceCollator(0)(list(dataset))
    batch = padded
    if cached:
        batch = FeatureCollator()(list(compute_features(model, dataset)))
    with torch.no_grad():
        streams = model.hidden_streams(padded["input_ids"], padded["attention_mask"])
        expected = q_adapter_loss(
            *(model.head(h) for h in streams), padded["input_ids"], padded["completion_mask"],
            objective, return_statistics=True,
        )
    output = batch_loss(model, batch)
    assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    means, actions = averages(output.columns), len(expected.statistics.entropy)
    numbers = {
        "preference_loss": expected.preference_loss, "chi2_loss": expected.chi2_loss,
        "rewards/chosen": expected.chosen_rewards.mean(),
        "rewards/rejected": expected.rejected_rewards.mean(),
        "rewards/margins": (expected.chosen_rewards - expected.rejected_rewards).mean(),
        "logps/chosen": expected.policy_logps[:5].mean(),
        "logps/rejected": expected.policy_logps[5:].mean(),
        "values/mean": expected.values.sum() / actions,
    }
    if not cached:
        numbers |= {n: x.mean() for n, x in expected.statistics._asdict().items()}
    assert means.keys() == numbers.keys() | {"rewards/accuracies"}
    for name, number in numbers.items():
        assert means[name] == pytest.approx(float(number), rel=1e-4, abs=1e-6), name

    pairs, num_actions, tokens = (int(x) for x in count(batch, "action"))
    assert (pairs, num_actions, tokens) == (5, actions, int(padded["attention_mask"].sum()))
    larger = batch_loss(model, batch, Totals(2 * pairs, 2 * num_actions, tokens))
    assert_close(larger.loss, output.loss / 2)
