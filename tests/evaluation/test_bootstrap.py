import math

import numpy as np
import pytest

from qadapter.evaluation import ClusterBootstrap, Estimate


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        values = rng.normal(0, 1, 80)
        e = ClusterBootstrap(range(80), num_resamples=400, seed=seed).mean(values)
        covered += e.low <= 0 <= e.high
    # 95% of 300 is 285 with a standard deviation of 3.8; percentile intervals run a little short.
    assert 268 <= covered <= 297


def test_clusters_widen_the_interval_by_what_they_share():
    values = np.repeat(np.random.default_rng(0).normal(0, 1, 50), 9)
    clustered = ClusterBootstrap(np.repeat(range(50), 9).tolist()).mean(values)
    naive = ClusterBootstrap(range(450)).mean(values)
    ratio = (clustered.high - clustered.low) / (naive.high - naive.low)
    assert clustered.value == pytest.approx(naive.value, abs=1e-12)
    assert ratio == pytest.approx(3, rel=0.2)  # nine copies: the square root


def test_seeded():
    values = np.random.default_rng(0).normal(0, 1, 30)
    first, again, other = (ClusterBootstrap(range(30), seed=s).mean(values) for s in (0, 0, 1))
    assert first == again and first != other


def test_weights_are_token_counts_and_masks():
    b = ClusterBootstrap(["p", "p", "q"])
    assert b.mean([1.0, 2.0, 5.0], weights=[1, 1, 2]).value == 13 / 4
    assert b.mean([1.0, 2.0, math.nan], weights=[1, 1, 0]).value == 1.5
    assert b.mean_of_means([0.0, 1.0, 1.0], [[1, 1, 0], [0, 0, 1]]).value == 0.75


def test_nothing_can_be_said_about_one_cluster_or_an_empty_group():
    one = ClusterBootstrap(["p", "p"]).mean([1.0, 2.0])
    assert one.value == 1.5 and math.isnan(one.low)
    assert one.as_dict("x") == {"x": 1.5, "x_ci": None}
    empty = ClusterBootstrap(["p", "q"]).mean_of_means([1.0, 0.0], [[1, 1], [0, 0]])
    assert empty.as_dict("x") == {"x": None, "x_ci": None}
    assert Estimate(0.0, -1.0, 1.0).map(math.exp).as_dict("y")["y"] == 1.0
