"""Confidence intervals by a bootstrap over clusters (prompts): pairs that share a prompt are not
independent, and a bootstrap over pairs would call the same question asked thrice three answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A number and its confidence interval. ``low`` and ``high`` are NaN where nothing can be said
    (fewer than two clusters)."""

    value: float
    low: float
    high: float

    def map(self, increasing: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the number."""
        return Estimate(*(increasing(x) for x in self))

    def as_dict(self, name: str) -> dict[str, float | list[float] | None]:
        """``{name: value, name_ci: [low, high]}`` as JSON types: NaN becomes None."""
        low, high = _json(self.low), _json(self.high)
        return {name: _json(self.value), f"{name}_ci": None if low is None else [low, high]}


class ClusterBootstrap:
    """Means with percentile intervals, from one set of resamples of whole clusters.

    Every statistic of one object sees the same resamples.

    Args:
        clusters: the cluster of each item [P], any hashable values (prompt ids).
        num_resamples: more narrows the noise of the interval's ends, not the interval.
        confidence: share of the interval.
        seed: of the resamples.
    """

    def __init__(
        self, clusters: Sequence, *, num_resamples: int = 2000, confidence: float = 0.95,
        seed: int = 0,
    ):
        names = list(dict.fromkeys(clusters))
        number = {name: i for i, name in enumerate(names)}
        self.num_clusters = len(names)
        self.confidence = confidence
        self._cluster_P = np.array([number[name] for name in clusters], dtype=np.int64)
        drawn = np.full(max(self.num_clusters, 1), 1 / max(self.num_clusters, 1))
        # How often each cluster is drawn in each resample.
        self._counts_RC = np.random.default_rng(seed).multinomial(
            self.num_clusters, drawn, size=num_resamples
        )

    def mean(self, values: ArrayLike, weights: ArrayLike | None = None) -> Estimate:
        """Σ weight·value / Σ weight over items [P]; ``weights``: token counts, or a 0/1 mask."""
        return self._estimate(*self._ratios(values, weights))

    def mean_of_means(self, values: ArrayLike, masks: Sequence[ArrayLike]) -> Estimate:
        """The unweighted mean, over groups, of each group's mean: groups count alike however many
        items they hold."""
        parts = [self._ratios(values, mask) for mask in masks]
        value = sum(part[0] for part in parts) / len(parts)
        return self._estimate(value, sum(part[1] for part in parts) / len(parts))

    def _ratios(self, values: ArrayLike, weights: ArrayLike | None) -> tuple[float, np.ndarray]:
        values_P = np.asarray(values, dtype=np.float64)
        weights_P = np.ones_like(values_P) if weights is None else np.asarray(weights, np.float64)
        size = max(self.num_clusters, 1)
        # A weight of 0 excludes an item, also one whose value is infinite or NaN.
        products_P = np.where(weights_P == 0, 0.0, weights_P * values_P)
        top_C = np.bincount(self._cluster_P, products_P, size)
        bottom_C = np.bincount(self._cluster_P, weights_P, size)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = np.divide(top_C.sum(), bottom_C.sum())
            return float(value), (self._counts_RC @ top_C) / (self._counts_RC @ bottom_C)

    def _estimate(self, value: float, resampled_R: np.ndarray) -> Estimate:
        # A resample without any item of a small group says nothing about it.
        resampled_R = resampled_R[np.isfinite(resampled_R)]
        if self.num_clusters < 2 or resampled_R.size == 0 or not math.isfinite(value):
            return Estimate(value, math.nan, math.nan)
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(resampled_R, [tail, 1 - tail])
        return Estimate(value, float(low), float(high))


def _json(x: float) -> float | None:
    return x if math.isfinite(x) else None
