"""One row against another at the same judged gain: made-up runs whose answer is known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qadapter.compare.against import at_equal_gain
from qadapter.compare.config import Row
from qadapter.compare.kinds import DPO
from qadapter.compare.results import Result


def row(*dials: dict[float, tuple], seeds=None, name="row") -> Result:
    """One dial a seed: strength → (gain of every prompt, KL of the texts), numbers or one a prompt
    and a text."""
    runs = []
    for seed, dial in zip(seeds or range(len(dials)), dials, strict=True):
        points = []
        for strength, (gain, kl) in dial.items():
            gains, kls = (np.broadcast_to(x, size).tolist() for x, size in ((gain, 4), (kl, 3)))
            mean = None if gain is None else float(np.mean(gains))
            points.append({
                "strength": strength, "retention": {"texts": {"kl_by_text": kls}},
                "answers": {"new": {
                    "judged": {"words": {"gain": mean, "gain_by_prompt": gains}},
                }},
            })
        runs.append({"seed": seed, "dial": points})
    return Result(Row(name, DPO(), tuple(run["seed"] for run in runs)), [{}] * len(runs), runs)


TRAINED = row({1.0: (1.5, 0.32)})
RISING = {0.5: (0.0, 0.01), 1.0: (1.0, 0.04), 2.0: (2.0, 0.16)}


def test_between_two_settings_the_logarithm_of_the_kl_follows_the_gain():
    found = at_equal_gain(row(RISING), TRAINED)
    assert found.kl_ratio["texts"] == pytest.approx([0.08 / 0.32] * 3)  # √(0.04·0.16), and sure
    assert found.strength == pytest.approx(1.5) and not found.at_most
    quarter = at_equal_gain(row(RISING), row({1.0: (1.25, 0.32)}))
    assert quarter.kl_ratio["texts"].value == pytest.approx(0.04 * 2 ** 0.5 / 0.32)


@pytest.mark.parametrize(("gain", "kl", "strength"), [(1.0, 0.04, 1.0), (2.0, 0.16, 2.0)])
def test_at_a_setting_it_is_that_setting(gain, kl, strength):
    found = at_equal_gain(row(RISING), row({1.0: (gain, 0.32)}))
    assert found.kl_ratio["texts"] == pytest.approx([kl / 0.32] * 3)
    assert found.strength == strength


def test_a_gain_that_is_never_reached_is_no_number():
    found = at_equal_gain(row(RISING), row({1.0: (2.01, 0.32)}))
    assert set(found.kl_ratio["texts"]) == {math.inf} and found.strength == math.inf


def test_a_gain_that_the_lowest_setting_has_is_reached_with_less():
    high = {w: (gain + 3, kl) for w, (gain, kl) in RISING.items()}
    found = at_equal_gain(row(high), TRAINED)
    assert found.at_most and found.strength == 0.5
    assert found.kl_ratio["texts"] == pytest.approx([0.01 / 0.32] * 3)


def test_a_dial_that_falls_again_has_reached_it_before():
    falling = {0.5: (0.0, 0.01), 1.0: (2.0, 0.04), 2.0: (1.5, 0.16)}
    found = at_equal_gain(row(falling), row({1.0: (1.0, 0.02)}))
    assert found.kl_ratio["texts"].value == pytest.approx(1.0)  # √(0.01·0.04)


def test_a_row_is_itself():
    moving = row(RISING, {w: (gain * 2, kl * 3) for w, (gain, kl) in RISING.items()})
    found = at_equal_gain(moving, moving)
    assert found.kl_ratio["texts"] == pytest.approx([1, 1, 1])
    assert found.strength == 1.0


def test_seeds_and_settings_are_means_and_only_shared_seeds_count():
    """Settings in any order, seeds of which one has no dial and one no partner."""
    dial = dict(reversed(RISING.items()))
    doubled = {w: (gain, 3 * kl) for w, (gain, kl) in dial.items()}
    ours = row(dial, doubled, {1.0: (9.0, 9.0)}, dial, seeds=[1, 2, 3, 4])
    theirs = row(*[{1.0: (g, 0.32)} for g in (1.2, 1.8, 9.0)], seeds=[1, 2, 3])
    found = at_equal_gain(ours, theirs)
    assert found.kl_ratio["texts"].value == pytest.approx(2 * 0.08 / 0.32)
    # A draw of two seeds may be one of them twice: 1.2 asked of one, 1.8 of the other.
    low, high = 0.04 * 4 ** 0.2 / 0.32, 3 * 0.04 * 4 ** 0.8 / 0.32
    assert found.kl_ratio["texts"] == pytest.approx([0.5, low, high])


def test_the_interval_holds_prompts_texts_and_what_is_not_reached():
    texts = row({w: (gain, [kl, kl, 4 * kl]) for w, (gain, kl) in RISING.items()})
    low, high = at_equal_gain(texts, TRAINED).kl_ratio["texts"][1:]
    assert (low, high) == pytest.approx((0.25, 1.0))  # of the draws of three, these are the ends
    prompts = row({w: (gain + np.array([-1, 0, 0, 1]), kl) for w, (gain, kl) in RISING.items()})
    ratio = at_equal_gain(prompts, TRAINED).kl_ratio["texts"]
    assert ratio.value == pytest.approx(0.25) and ratio.low < 0.25
    assert ratio.high == math.inf  # in 9 of 256 draws the highest setting gains less than 1.5
    sure = at_equal_gain(prompts, TRAINED, confidence=0.8).kl_ratio["texts"]
    assert ratio.low < sure.low < 0.25 < sure.high < math.inf


@pytest.mark.parametrize(("ours", "theirs"), [
    (row({1.0: (2.0, 0.04)}), TRAINED),  # no dial
    (row({0.0: (0.0, 0.0), 1.0: (2.0, 0.04)}), TRAINED),  # the base is no setting to stop at
    (row(RISING), row({1.0: (1.5, 0.32)}, seeds=[7])),
    (row(RISING), row({1.0: (-0.5, 0.32)})),
    (row(RISING), row({1.0: ([-1, 0, 0, 2], 0.32)})),  # a gain, and perhaps none
    (row(RISING), row({1.0: (None, 0.32)})),
    (row({w: (None, kl) for w, (_, kl) in RISING.items()}), TRAINED),
])
def test_where_nothing_can_be_said_nothing_is(ours, theirs):
    assert at_equal_gain(ours, theirs) is None


def test_what_has_not_moved_has_no_ratio():
    still = row({w: (gain, 0.0) for w, (gain, _) in RISING.items()})
    assert math.isnan(at_equal_gain(still, TRAINED).kl_ratio["texts"].value)
    assert math.isnan(at_equal_gain(row(RISING), row({1.0: (1.5, 0.0)})).kl_ratio["texts"].value)
