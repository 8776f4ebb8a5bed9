"""The pictures of a comparison, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qadapter.compare.config import folder_name
from qadapter.compare.drawing import (
    color_of,
    dashes_of,
    figure_of,
    legend,
    line,
    log_scale,
    marker_of,
    marker_size,
    name_axes,
    size_legend,
    size_of,
    svg,
)
from qadapter.compare.results import (
    Comparison,
    Measure,
    Result,
    answers,
    judged,
    old_margins,
    preference,
    retention,
)
from qadapter.evaluation.report import plain_labels
from qadapter.system.markup import picture_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KL = "KL(base‖customised) [nats a token]"
_GAIN = "judged gain [SD of the base's scores]"
_DIALLED = {"alpha": "alpha_tilde", "beta": "beta"}
"""Options of a sweep that a strength w moves too, to their value over w (design §2, fact 7)."""


class Picture(NamedTuple):
    """``name`` is the file's, without suffix; ``caption`` says how to read it."""

    name: str
    caption: str
    svg: str


def draw_all(comparison: Comparison, folder: str | Path | None = None) -> list[Picture]:
    """Every picture that the results hold something for.

    Args:
        folder: gets a PNG of each; none to write nothing.
    """
    drawings: list[tuple[str, str, Callable[[Comparison], Figure | None]]] = [
        ("retention", "Retention during training: how far each method has moved from the base on "
         f"{comparison.texts[0]}, which it does not train on. Lower keeps more.", draw_retention),
        ("win_rates", "How often an answer is preferred to the base's own, by the judges together, "
         "for the new preference and for the one the base had learned before. Small dots: seeds; "
         "whiskers: the mean of their 95% intervals over prompts.", draw_win_rates),
        ("frontier", "What is gained against what is moved: each curve is one method's dial, "
         "strength 1 filled, small dots there its seeds; grey: controls. Up and to the left is "
         "better. Whiskers: 95% intervals over prompts. The larger the filled point, the more its "
         "training took.", draw_frontier),
        ("razor", "What is forgotten against what is moved where the new prompts are answered (the "
         "base's own answers), at every setting of every dial, strength 1 filled. On one line the "
         "second tells the first, whatever the method; lower forgets less for as much moved. "
         "Dotted: as much of both. Whiskers: 95% intervals over texts.", draw_razor),
        ("old_margins", "What becomes of the preference the base had learned before: how much more "
         "or less than the base each policy prefers the preferred answers of held-out old pairs, "
         "by how clearly the base does. Small dots: seeds.", draw_old_margins),
    ]
    for name, sweep in comparison.config["sweeps"].items():
        also = ", and the dial of one trained adapter" if sweep["option"] in _DIALLED else ""
        drawings.append((
            f"sweep_{folder_name(name)}",
            f"{sweep['of']} trained at several values of {sweep['option']}{also}.",
            lambda c, name=name: draw_sweep(c, name),
        ))
    pictures = []
    with plain_labels():
        for name, caption, draw in drawings:
            figure = draw(comparison)
            if figure is None:
                continue
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                figure.savefig(Path(folder) / f"{name}.png")
            pictures.append(Picture(name, caption, svg(figure)))
    return pictures


def draw_retention(comparison: Comparison) -> Figure | None:
    trained = [(number, r) for number, r in _curves(comparison) if r.trainings]
    if not trained:
        return None
    figure, (left, right) = figure_of(2)
    for number, result in trained:
        steps = [point["tokens"] for point in result.trainings[0]["curve"]]
        for axes, key in ((left, "kl_per_token"), (right, "top1_agreement")):
            curves = [
                [_number(point[key]) for point in training["curve"]]
                for training in result.trainings
            ]
            curves = [curve for curve in curves if len(curve) == len(steps)]
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            thousands = [step / 1000 for step in steps]
            line(axes, number, thousands, means, picture_text(result.row.name))
            if len(curves) > 1:
                axes.fill_between(thousands, *_range(curves), color=color_of(number), alpha=0.15,
                                  linewidth=0)
    name_axes(left, "tokens seen [thousands]", _KL)
    name_axes(right, "tokens seen [thousands]", "same top token as the base")
    log_scale(left)
    legend(figure, left)
    return figure


def draw_win_rates(comparison: Comparison) -> Figure | None:
    if not comparison.judged:
        return None
    kinds = comparison.judged_kinds
    rows = [r for r in comparison.main if r.number(judged(kinds[0], "win_rate")) is not None]
    if not rows:
        return None
    figure, panels = figure_of(len(kinds), height=1.2 + 0.42 * len(rows))
    numbers = {result.row.name: number for number, result in _curves(comparison)}
    for axes, kind in zip(panels, kinds, strict=True):
        measure = judged(kind, "win_rate")
        for at, result in enumerate(rows):
            found = result.number(measure)
            if found is None:
                continue
            number = numbers.get(result.row.name)
            color, marker = ("0.45", "x") if number is None else (
                color_of(number), marker_of(number))
            if found.low is not None:
                axes.plot([found.low, found.high], [at, at], color=color, linewidth=1.5)
            seeds = [
                measure(run, point)[0] for run in result.runs for point in run["dial"]
                if point["strength"] == result.trained
            ]
            axes.plot(seeds, [at] * len(seeds), ".", color=color, markersize=4, alpha=0.7)
            axes.plot(found.mean, at, marker, color=color, markersize=8)
        axes.axvline(0.5, color="0.5", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), [picture_text(r.row.name) for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        name_axes(axes, "win rate over the base", None)
        axes.set_title(f"{kind} preference", loc="left")
        axes.grid(axis="x", color="0.9", linewidth=0.8)
    return figure


def draw_frontier(comparison: Comparison) -> Figure | None:
    curves = _curves(comparison)
    gain, gain_label = _learned(comparison.judged)
    drift = retention(comparison.texts[0], "kl_per_token")
    if not curves:
        return None
    figure, [axes] = figure_of(1, height=4.6)
    placed = [
        _dial(axes, number, result, drift, gain, size_of(_cost(result) or 0))
        for number, result in curves
    ]
    placed += [_control(axes, result, drift, gain) for result in _controls(comparison)]
    if not any(placed):  # none has moved at all: there is no frontier
        return None
    axes.axhline(0 if comparison.judged else 0.5, color="0.5", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    name_axes(axes, f"{_KL}, {picture_text(comparison.texts[0])}", gain_label)
    legend(figure, axes)
    if costs := [cost for _, result in curves if (cost := _cost(result)) is not None]:
        size_legend(figure, costs, "training, processor seconds:")
    return figure


def draw_razor(comparison: Comparison) -> Figure | None:
    """After "RL's razor" (Shenfeld et al. 2025, arXiv 2509.04259)."""
    curves = _curves(comparison)
    if not comparison.sampled or not curves:
        return None
    moved = answers("new", "kl_on_base_answers")
    forgotten = retention(comparison.texts[0], "kl_per_token")
    figure, [axes] = figure_of(1, height=4.6)
    placed = [_dial(axes, number, result, moved, forgotten, 8) for number, result in curves]
    if not any(placed):
        return None
    for result in _controls(comparison):
        found = [result.number(measure) for measure in (moved, forgotten)]
        if all(x is not None and x.mean > 0 for x in found):
            axes.plot(*(x.mean for x in found), "x", color="0.4", markersize=7,
                      label=picture_text(result.row.name))
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("log")
    ends = [max(low, high) for low, high in zip(axes.get_xlim(), axes.get_ylim(), strict=True)]
    axes.plot(ends, ends, color="0.5", linestyle=":", linewidth=1, scalex=False, scaley=False)
    name_axes(axes, f"{_KL}, answers to the new prompts",
              f"{_KL},\n{picture_text(comparison.texts[0])}")
    legend(figure, axes)
    return figure


def draw_old_margins(comparison: Comparison) -> Figure | None:
    """After Sequential DPO (arXiv 2606.19744)."""
    base = old_margins(comparison.results[0].runs[0])
    curves = [
        (number, result) for number, result in _curves(comparison)
        if all(old_margins(run) is not None for run in result.runs)
    ]
    if base is None or not curves:
        return None
    usable = np.flatnonzero(np.isfinite(base))
    quartiles = np.array_split(usable[np.argsort(base[usable], kind="stable")], 4)
    if not all(map(len, quartiles)):
        return None
    figure, [axes] = figure_of(1, height=4.6)
    for at, (number, result) in enumerate(curves):
        changes = [
            [float(np.mean((old_margins(run) - base)[pairs])) for pairs in quartiles]
            for run in result.runs
        ]
        # Side by side, not on top of each other.
        places = [x + 0.6 * ((at + 0.5) / len(curves) - 0.5) for x in range(4)]
        for values in changes if len(changes) > 1 else []:
            axes.plot(places, values, ".", color=color_of(number), markersize=4, alpha=0.7)
        line(axes, number, places, np.mean(changes, axis=0).tolist(), picture_text(result.row.name))
    axes.axhline(0, color="0.5", linestyle=":", linewidth=1)
    means = [f"{float(np.mean(base[pairs])):.2f}" for pairs in quartiles]
    axes.set_xticks(range(4), [f"{name}\n{mean}" for name, mean in zip(
        ("lowest quarter", "second", "third", "highest quarter"), means, strict=True)])
    name_axes(axes, "old pairs by the base's margin, and its mean [nats a token]",
              "change of the margin [nats a token]")
    legend(figure, axes)
    return figure


def draw_sweep(comparison: Comparison, name: str) -> Figure | None:
    points = comparison.sweep(name)
    if len(points) < 2:
        return None
    sweep = comparison.config["sweeps"][name]
    figure, panels = figure_of(2)
    drift = retention(comparison.texts[0], "kl_per_token"), _KL
    asked = all(result.number(judged("new", "gain")) is not None for _, result in points)
    for axes, (measure, label) in zip(panels, (_learned(asked), drift), strict=True):
        found = [(value, result.number(measure)) for value, result in points]
        if any(isinstance(value, str) for value, _ in points):
            axes.set_xticks(range(len(points)), [picture_text(str(x)) for x, _ in points])
            found = [(i, x) for i, (_, x) in enumerate(found)]
        found = [(value, x) for value, x in found if x is not None]
        if not found:
            continue
        line(axes, 0, *zip(*((value, x.mean) for value, x in found), strict=True),
              f"trained at this {sweep['option']}")
        for value, x in found:
            if x.low is not None:
                axes.plot([value, value], [x.low, x.high], color=color_of(0), linewidth=1)
        if sweep["option"] in _DIALLED:
            alpha = comparison.config["methods"][sweep["of"]][_DIALLED[sweep["option"]]]
            dial = [
                (alpha / w, x.mean) for origin in comparison.results
                if origin.row.name == sweep["of"]
                for w, [x] in origin.dial(measure) if x and w > 0
            ]
            if dial:
                line(axes, 1, *zip(*dial, strict=True),
                      f"{picture_text(sweep['of'])} by the dial: {alpha:g}/w")
        values = [value for value, _ in points]
        if any(isinstance(value, str) for value in values):
            axes.set_xlim(-0.5, len(values) - 0.5)
        elif min(values) > 0:
            axes.set_xscale("log")
        elif positive := [value for value in values if value > 0]:
            axes.set_xscale("symlog", linthresh=min(positive))
        name_axes(axes, sweep["option"], label)
    log_scale(panels[1])
    legend(figure, panels[0])
    return figure


def _learned(asked: bool) -> tuple[Measure, str]:
    """What was learned, and its name: the judged gain, or where nothing was asked the accuracy."""
    if asked:
        return judged("new", "gain"), _GAIN
    return preference("new", "preference_accuracy"), "accuracy by implicit reward"


# --- parts --------------------------------------------------------------------------------------


def _curves(comparison: Comparison) -> list[tuple[int, Result]]:
    """The rows that are drawn as curves, and the number of each one's look: the same everywhere."""
    return list(enumerate(
        r for r in comparison.main if r.trainings or len(r.strengths) > 1
    ))


def _controls(comparison: Comparison) -> list[Result]:
    """The other rows, but for the base."""
    drawn = [result for _, result in _curves(comparison)]
    return [result for result in comparison.main[1:] if result not in drawn]


def _cost(result: Result) -> float | None:
    """Processor seconds of a training, mean over seeds; None for a row without."""
    found = [training["processor_seconds"] for training in result.trainings]
    return sum(found) / len(found) if found else None


def _dial(
    axes: Axes, number: int, result: Result, x: Measure, y: Measure, size: float
) -> bool:
    """One row's settings, the trained one in this size. Whether any of them has a place on a
    logarithmic axis of x."""
    found = [(w, a, b) for w, (a, b) in result.dial(x, y) if a and b and a.mean > 0]
    color, marker = color_of(number), marker_of(number)
    # Not of the points themselves: in a list of names all are of one size.
    axes.plot([], [], marker + dashes_of(number), color=color, markersize=7, linewidth=1.2,
              label=picture_text(result.row.name))
    axes.plot([a.mean for _, a, _ in found], [b.mean for _, _, b in found], dashes_of(number),
              color=color, linewidth=1.2, alpha=0.8)
    seeds = [
        (x(run, point), y(run, point)) for run in result.runs for point in run["dial"]
        if point["strength"] == result.trained
    ]
    seeds = [(a[0], b[0]) for a, b in seeds if a and b]
    if len(seeds) > 1:
        axes.plot(*zip(*seeds, strict=True), ".", color=color, markersize=4, alpha=0.7)
    for w, a, b in found:
        own = w == 1
        axes.plot(a.mean, b.mean, marker, color=color,
                  markersize=marker_size(number, size if own else 4.5),
                  markerfacecolor=color if own else "white",
                  markeredgecolor="white" if own else color, markeredgewidth=0.6 if own else 1,
                  zorder=3 - size / 100 if own else 2.5)  # the larger ones below
        if own and b.low is not None:
            axes.plot([a.mean, a.mean], [b.low, b.high], color=color, linewidth=0.8, alpha=0.6)
    return bool(found)


def _control(axes: Axes, result: Result, x: Measure, y: Measure) -> bool:
    """A grey cross; a line across where the base itself has not moved. Whether it is a cross."""
    moved, gained, name = result.number(x), result.number(y), picture_text(result.row.name)
    if gained is None:
        return False
    if placed := moved is not None and moved.mean > 0:
        axes.plot(moved.mean, gained.mean, "x", color="0.4", markersize=7, label=name)
    else:
        axes.axhline(gained.mean, color="0.4", linestyle="--", linewidth=1, label=name)
    return placed


def _number(found: float | None) -> float:
    """As a curve takes it: what could not be measured is a gap."""
    return math.nan if found is None else found


def _range(curves: list[list[float]]) -> tuple[list[float], list[float]]:
    columns = list(zip(*curves, strict=True))
    return [min(c) for c in columns], [max(c) for c in columns]
