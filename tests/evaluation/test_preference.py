import math

import numpy as np
import pytest
import torch
from data.tiny import chatml
from tiny_models import preference_rows, tiny_adapter, tiny_llama, tokenized

from qadapter import ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.data import PreferenceCollator, as_preferences, tokenize_preferences
from qadapter.evaluation import ClusterBootstrap, evaluate_preferences
from qadapter.evaluation.preference import _calibrate
from qadapter.objective import q_adapter_loss


def full_logits(model, dataset):
    """Both streams' logits of the whole dataset as one batch."""
    batch = PreferenceCollator(pad_token_id=0)(list(dataset))
    with torch.no_grad():
        streams = model.hidden_streams(batch["input_ids"], batch["attention_mask"])
        return batch, [h.float() @ model.head.weight.float().T for h in streams]


@pytest.mark.parametrize("objective", [
    ObjectiveConfig(),
    ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.5, gamma=0.9, bootstrap="current"),
    ObjectiveConfig(parametrization="q", alpha_0=0.7, length_normalization="completion"),
    ObjectiveConfig(mask_alignment="state"),
])
def test_scores_are_those_of_the_objective_on_full_logits(objective):
    model, dataset = tiny_adapter(trained=True, objective=objective), tokenized()
    pairs = evaluate_preferences(model, dataset, batch_size=3, num_resamples=10).pairs
    batch, (a, b) = full_logits(model, dataset)
    expected = q_adapter_loss(a, b, batch["input_ids"], batch["completion_mask"], objective)
    # Float32 sums of some twenty terms of size ten.
    close = {"rtol": 1e-5, "atol": 2e-4}
    np.testing.assert_allclose(pairs.chosen_reward, expected.chosen_rewards, **close)
    np.testing.assert_allclose(pairs.rejected_reward, expected.rejected_rewards, **close)
    if objective.mask_alignment == "action":
        policy, base = expected.policy_logps.numpy(), expected.base_logps.numpy()
        half = len(dataset)
        np.testing.assert_allclose(pairs.chosen_policy_logp, policy[:half], **close)
        np.testing.assert_allclose(pairs.rejected_policy_logp, policy[half:], **close)
        np.testing.assert_allclose(pairs.chosen_base_logp, base[:half], **close)
        np.testing.assert_allclose(pairs.rejected_base_logp, base[half:], **close)
    assert pairs.chosen_tokens.tolist() == [len(ids) for ids in dataset["chosen_ids"]]


@pytest.mark.parametrize("customised", [True, False])
def test_a_frozen_trunk_runs_no_padding_and_common_beginnings_once(customised):
    dataset, passed = tokenized(), []
    model = tiny_adapter(trained=True) if customised else tiny_llama()
    body = (model.base if customised else model).model
    body.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    evaluate_preferences(model, dataset, batch_size=len(dataset), num_resamples=10)
    beginnings = {
        tuple((pair["prompt_ids"] + pair[f"{side}_ids"])[:end])
        for pair in dataset for side in ("chosen", "rejected")
        for end in range(1, len(pair["prompt_ids"] + pair[f"{side}_ids"]) + 1)
    }
    assert passed[-1] == len(beginnings)


def test_an_untrained_adapter_is_the_base_to_the_last_digit():
    result = evaluate_preferences(tiny_adapter(trained=False), tokenized(), num_resamples=50)
    assert result.preference_accuracy == (0.5, 0.5, 0.5)
    assert result.reward_margin == (0.0, 0.0, 0.0)
    assert result.answer_kl_per_token == (0.0, 0.0, 0.0)
    assert result.preference_accuracy_policy == result.preference_accuracy_base
    assert result.policy_margin == result.base_margin
    np.testing.assert_array_equal(result.pairs.chosen_policy_logp, result.pairs.chosen_base_logp)
    assert result.calibration.log_loss.value == pytest.approx(math.log(2), abs=1e-12)


def test_strength_zero_is_the_base_and_strength_moves_no_reward():
    model, dataset = tiny_adapter(trained=True), tokenized()
    trained = evaluate_preferences(model, dataset, num_resamples=10)
    base = evaluate_preferences(model, dataset, strength=0.0, num_resamples=10)
    assert trained.policy_margin.value != trained.base_margin.value
    assert base.policy_margin == base.base_margin
    assert base.answer_kl_per_token.value == 0
    np.testing.assert_allclose(base.pairs.chosen_reward, trained.pairs.chosen_reward, atol=1e-5)


def test_a_plain_model_has_the_numbers_of_a_base_and_no_others():
    dataset = tokenized()
    plain = evaluate_preferences(tiny_llama(), dataset, num_resamples=10)
    adapter = evaluate_preferences(tiny_adapter(trained=True), dataset, num_resamples=10)
    assert plain.preference_accuracy_base == adapter.preference_accuracy_base
    assert plain.base_margin == adapter.base_margin
    assert plain.preference_accuracy is None and plain.calibration is None
    assert plain.preference_accuracy_policy is None
    assert "preference_accuracy" not in plain.as_dict()


def test_shuffled_labels_give_a_half():
    rng = np.random.default_rng(0)
    rows = preference_rows(300)
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    dataset = tokenize_preferences(as_preferences(rows), chatml()).dataset
    result = evaluate_preferences(tiny_adapter(trained=True), dataset, num_resamples=500)
    # 300 fair coins: five standard deviations are 0.145.
    assert abs(result.preference_accuracy.value - 0.5) < 0.145
    assert abs(result.longer_wins.value - 0.5) < 0.145


def test_length_alone_wins_the_plain_accuracy_and_half_of_the_controlled_one():
    rows = preference_rows(12)
    for row in rows[:3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    dataset = tokenize_preferences(as_preferences(rows), chatml()).dataset
    result = evaluate_preferences(tiny_llama(), dataset, num_resamples=10)
    assert result.shorter_wins.value == 0.75 and result.longer_wins.value == 0.25
    assert result.share_chosen_longer == 0.25
    wins = result.pairs.margin("base_logp") > 0
    longer = result.pairs.chosen_tokens > result.pairs.rejected_tokens
    expected = (wins[longer].mean() + wins[~longer].mean()) / 2
    assert wins[longer].mean() != wins[~longer].mean()
    assert result.preference_accuracy_base_length_controlled.value == expected
    bootstrap = ClusterBootstrap(range(12), num_resamples=10)
    shorter_wins = np.array([0.0] * 3 + [1.0] * 9)
    longer = shorter_wins == 0
    assert bootstrap.mean_of_means(shorter_wins, [longer, ~longer]).value == 0.5


def test_order_and_batch_size_change_nothing_but_rounding():
    model, dataset = tiny_adapter(trained=True), tokenized()
    one = evaluate_preferences(model, dataset, batch_size=1, num_resamples=10)
    reverse = dataset.select(range(len(dataset) - 1, -1, -1))
    other = evaluate_preferences(model, reverse, batch_size=16, num_resamples=10)
    np.testing.assert_allclose(
        other.pairs.chosen_reward[::-1], one.pairs.chosen_reward, rtol=1e-4, atol=1e-4
    )
    assert other.pairs.row.tolist() == one.pairs.row.tolist()[::-1]


def test_calibration_of_margins_that_are_probabilities():
    rng = np.random.default_rng(0)
    size = 20_000
    margin = rng.normal(0, 2, size)
    # The chosen answer is the one the margin favors with probability σ(|margin|), exactly.
    right = rng.random(size) < 1 / (1 + np.exp(-np.abs(margin)))
    signed = np.where(right, np.abs(margin), -np.abs(margin))
    bootstrap = ClusterBootstrap(range(size), num_resamples=10)
    calibrated = _calibrate(signed, bootstrap)
    # A bin of 2,000 pairs has a standard error of 0.011.
    assert calibrated.expected_calibration_error < 0.02
    assert sum(b.count for b in calibrated.bins) == size
    overconfident = _calibrate(4 * signed, bootstrap)
    assert overconfident.expected_calibration_error > 0.1
    assert overconfident.log_loss.value > calibrated.log_loss.value
    hopeless = _calibrate(np.array([-1e4, -1e4]), ClusterBootstrap("ab", num_resamples=10))
    assert hopeless.bins[-1].count == 2 and hopeless.expected_calibration_error == 1


def test_progress_is_reported_and_the_mode_put_back():
    model, seen = tiny_adapter(trained=True).train(), []
    evaluate_preferences(
        model, tokenized(6), batch_size=4, num_resamples=5,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 6), (6, 6)] and model.training


def test_no_pairs_is_one_clear_error():
    with pytest.raises(QAdapterError, match="no pairs"):
        evaluate_preferences(tiny_llama(), tokenized().select([]))


def test_sixteen_bit_models_are_scored_in_float32():
    """log π of a bfloat16 model from float32 products: far closer to float64 than bfloat16 is."""
    base, dataset = tiny_llama().bfloat16(), tokenized()
    model = QAdapterModel.from_base(base)
    pairs = evaluate_preferences(model, dataset, batch_size=16, num_resamples=5).pairs
    batch = PreferenceCollator(pad_token_id=0)(list(dataset))
    hidden = model.base_hidden(batch["input_ids"], batch["attention_mask"])
    exact = torch.log_softmax(hidden.double() @ base.lm_head.weight.double().T, -1)
    tokens, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    logps = exact[:, :-1].gather(2, tokens[..., None])[..., 0]
    expected = (logps * mask).sum(1)[: len(dataset)]
    # The trunk's own bfloat16 results depend on the batch's shape in their last bits.
    np.testing.assert_allclose(pairs.chosen_base_logp, expected.detach(), rtol=1e-5)
