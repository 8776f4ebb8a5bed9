"""One row of a comparison against another: as both are trained, and at the same judged gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qadapter.compare.results import Result
from qadapter.evaluation.bootstrap import ClusterBootstrap, Estimate
from qadapter.evaluation.preference import wins


class Against(NamedTuple):
    """What one row has over another's trained policy, means over seeds: pair by pair and prompt by
    prompt, so that what both owe to an easy prompt or to a draw of the base's cancels. Intervals:
    95%, bootstrap over prompts or texts; noise of the training is not in them."""

    accuracy: Estimate
    """Difference in accuracy by implicit reward, new preference."""
    gain: Estimate
    """Difference in judged gain, new preference, mean of the judges; NaN where there are none."""
    kl_ratio: dict[str, Estimate]
    """Texts → KL(base‖customised) over the other's; NaN where the other is the base."""


def against(result: Result, reference: Result, strength: float | None = None) -> Against:
    """Compare two rows of one comparison.

    Args:
        strength: a setting of ``result``'s dial, over the seeds that were measured there and the
            reference's runs of the same seeds; none for both trained policies, over all seeds.
    """
    ours = _points(result, result.trained if strength is None else strength)
    theirs = _points(reference, reference.trained)
    if strength is not None:
        seeds = {run["seed"] for run, _ in ours}
        theirs = [(run, point) for run, point in theirs if run["seed"] in seeds]

    def both(values: Callable[[dict, dict], Any]) -> list[np.ndarray]:
        # As floats: None, which stands for what is no number, is NaN.
        return [np.mean([np.array(values(*at), float) for at in side], axis=0)
                for side in (ours, theirs)]

    def difference(
        values: Callable[[dict, dict], Any], clusters: list[str] | None = None
    ) -> Estimate:
        found = np.subtract(*both(values))
        return ClusterBootstrap(clusters or range(len(found))).mean(found)

    def kl_ratio(name: str) -> Estimate:
        kl, reference_kl = both(lambda run, point: point["retention"][name]["kl_by_text"])
        if not np.nan_to_num(reference_kl).any():
            return Estimate(math.nan, math.nan, math.nan)
        return ClusterBootstrap(range(len(kl))).mean(kl / reference_kl, reference_kl)

    first = result.runs[0]
    return Against(
        difference(
            lambda run, point: wins(
                np.array(run["preferences"]["new"]["reward_margins"], float)
            ),
            first["preferences"]["new"]["prompt_ids"],
        ),
        difference(lambda run, point: _gain_by_prompt(point)),
        {name: kl_ratio(name) for name in first["dial"][0]["retention"]},
    )


def _points(result: Result, strength: float) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(run, its point of the dial), one a seed that was measured at this strength."""
    return [
        (run, point) for run in result.runs for point in run["dial"]
        if point["strength"] == strength
    ]


def _gain_by_prompt(point: dict[str, Any]) -> np.ndarray:
    """Mean of the judges at each prompt [P]; one NaN where nothing was judged."""
    judges = point["answers"].get("new", {"judged": {}})["judged"].values()
    # None where the base's scores had no spread to measure by.
    found = [judge["gain_by_prompt"] for judge in judges if judge["gain"] is not None]
    return np.mean(np.array(found, float), axis=0) if found else np.array([math.nan])


# --- at equal gain ------------------------------------------------------------------------------


class EqualGain(NamedTuple):
    """What a row moves where its dial gains what another row gains as trained. Intervals: 95%,
    bootstrap over prompts, texts and training seeds together (a few seeds are few draws: it holds
    some of the training's noise, not all)."""

    strength: float
    """The setting of the dial at which it gains as much; inf if it never does."""
    kl_ratio: dict[str, Estimate]
    """Texts → KL(base‖customised) there over the other's as trained. inf: not reached; so is the
    upper end where more resamples than the interval leaves out do not reach it. NaN: one of the two
    has not moved at all."""
    at_most: bool
    """The dial's lowest setting gains that much already: it would be reached with less."""


def at_equal_gain(
    result: Result, reference: Result, *, num_resamples: int = 2000, confidence: float = 0.95,
    seed: int = 0,
) -> EqualGain | None:
    """KL of a row at the gain of another's trained policy.

    Gains and KLs are means over the seeds that have the whole dial and that the reference was
    trained with. Going up the dial, the gain is reached between two neighbouring settings; there
    log KL is taken as linear in the gain.

    Args:
        result: a row measured at several settings of its dial.
        reference: the row whose gain at strength 1 is asked for.
        num_resamples, confidence, seed: of the bootstrap.

    Returns:
        None where nothing can be said: a row without a dial, answers that no judge scored, no seed
        in common, or a reference whose own gain is not above 0 beyond doubt.
    """
    strengths = [w for w in result.strengths if w > 0]
    ours = {
        run.get("seed"): [point for point in run["dial"] if point["strength"] > 0]
        for run in result.runs
    }
    theirs = {run.get("seed"): point for run, point in _points(reference, reference.trained)}
    seeds = [s for s, dial in ours.items() if s in theirs and len(dial) == len(strengths)]
    if len(strengths) < 2 or not seeds:
        return None
    dials = [sorted(ours[s], key=lambda point: point["strength"]) for s in seeds]
    trained = [theirs[s] for s in seeds]
    gain_SWP = np.array([[_gain_by_prompt(point) for point in dial] for dial in dials])
    wanted_SP = np.array([_gain_by_prompt(point) for point in trained])
    if not (np.isfinite(gain_SWP).all() and np.isfinite(wanted_SP).all()):
        return None

    generator = np.random.default_rng(seed)

    def draws(count: int) -> np.ndarray:
        """Shares of each of so many items: as they are, then in the resamples."""
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=num_resamples)
        return np.concatenate([np.ones((1, count)), drawn]) / count

    tail = (1 - confidence) / 2
    seeds_RS, prompts_RP = draws(len(seeds)), draws(wanted_SP.shape[1])
    wanted_R = np.einsum("rs,sp,rp->r", seeds_RS, wanted_SP, prompts_RP, optimize=True)
    if not np.quantile(wanted_R[1:], tail) > 0:
        return None
    gain_RW = np.einsum("rs,swp,rp->rw", seeds_RS, gain_SWP, prompts_RP, optimize=True)
    settings_RW = np.broadcast_to(np.array(strengths), gain_RW.shape)
    ratios = {}
    for name in dials[0][0]["retention"]:
        kl_SWT, reference_ST = (
            np.array(x, float) for x in (
                [[point["retention"][name]["kl_by_text"] for point in dial] for dial in dials],
                [point["retention"][name]["kl_by_text"] for point in trained],
            )
        )
        texts_RT = draws(reference_ST.shape[1])
        kl_RW = np.einsum("rs,swt,rt->rw", seeds_RS, kl_SWT, texts_RT, optimize=True)
        reference_R = np.einsum("rs,st,rt->r", seeds_RS, reference_ST, texts_RT, optimize=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            found_R = np.exp(_reached(np.log(kl_RW), gain_RW, wanted_R)) / reference_R
        moved = (kl_RW[0] > 0).all() and reference_R[0] > 0
        low, high = _quantiles(found_R[1:], tail)
        ratios[name] = (
            Estimate(float(found_R[0]), low, high) if moved else Estimate(*[math.nan] * 3)
        )
    return EqualGain(
        float(_reached(settings_RW, gain_RW, wanted_R)[0]), ratios,
        bool(gain_RW[0, 0] >= wanted_R[0]),
    )


def _reached(values_RW: np.ndarray, gain_RW: np.ndarray, wanted_R: np.ndarray) -> np.ndarray:
    """What goes with the wanted gain along each dial, linear between the two settings where it is
    reached first; the first value where that has it already, inf where none has."""
    rows = np.arange(len(wanted_R))
    enough_RW = gain_RW >= wanted_R[:, None]
    upper = enough_RW.argmax(1)
    lower = np.maximum(upper - 1, 0)
    rise = np.where(upper > lower, gain_RW[rows, upper] - gain_RW[rows, lower], 1)
    share = np.where(upper > lower, (wanted_R - gain_RW[rows, lower]) / rise, 1)
    found = values_RW[rows, lower] * (1 - share) + values_RW[rows, upper] * share
    return np.where(enough_RW.any(1), found, math.inf)


def _quantiles(found_R: np.ndarray, tail: float) -> tuple[float, float]:
    """Of numbers that may be infinite: those between are not made up."""
    found_R = found_R[~np.isnan(found_R)]
    if not found_R.size:
        return math.nan, math.nan
    low = np.quantile(found_R, tail, method="lower")
    return float(low), float(np.quantile(found_R, 1 - tail, method="higher"))
