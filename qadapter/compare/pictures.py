"""The pictures of a comparison, from its results alone.

Colours are Okabe and Ito's, told apart with any colour vision (but their yellow, too pale for a
line on white). Where there are more methods than colours, markers and dashes tell them apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qadapter.compare.config import folder_name
from qadapter.compare.results import (
    Comparison,
    Measure,
    Result,
    judged,
    preference,
    retention,
)
from qadapter.evaluation.report import plain_labels
from qadapter.system.markup import picture_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
"""One more than colours, so that no pair of them comes back before the fifty-sixth method."""
DASHES = "-", "--", ":"
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
         "better. Whiskers: 95% intervals over prompts.",
         draw_frontier),
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
            pictures.append(Picture(name, caption, _svg(figure)))
    return pictures


def draw_retention(comparison: Comparison) -> Figure | None:
    trained = [r for r in comparison.main if r.trainings]
    if not trained:
        return None
    figure, (left, right) = _figure(2)
    for number, result in enumerate(trained):
        steps = [point["tokens"] for point in result.trainings[0]["curve"]]
        for axes, key in ((left, "kl_per_token"), (right, "top1_agreement")):
            curves = [
                [_number(point[key]) for point in training["curve"]]
                for training in result.trainings
            ]
            curves = [curve for curve in curves if len(curve) == len(steps)]
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            thousands = [step / 1000 for step in steps]
            _line(axes, number, thousands, means, picture_text(result.row.name))
            if len(curves) > 1:
                axes.fill_between(thousands, *_range(curves), color=_color(number), alpha=0.15,
                                  linewidth=0)
    _name(left, "tokens seen [thousands]", _KL)
    _name(right, "tokens seen [thousands]", "same top token as the base")
    _log_scale(left)
    _legend(figure, left)
    return figure


def draw_win_rates(comparison: Comparison) -> Figure | None:
    if not comparison.judged:
        return None
    kinds = comparison.judged_kinds
    rows = [r for r in comparison.main if r.number(judged(kinds[0], "win_rate")) is not None]
    if not rows:
        return None
    figure, panels = _figure(len(kinds), height=1.2 + 0.42 * len(rows))
    for axes, kind in zip(panels, kinds, strict=True):
        measure = judged(kind, "win_rate")
        for number, result in enumerate(rows):
            found = result.number(measure)
            if found is None:
                continue
            color = _color(number - 1) if result.trainings else "0.45"
            if found.low is not None:
                axes.plot([found.low, found.high], [number, number], color=color, linewidth=1.5)
            seeds = [
                measure(run, point)[0] for run in result.runs for point in run["dial"]
                if point["strength"] == result.trained
            ]
            axes.plot(seeds, [number] * len(seeds), ".", color=color, markersize=4, alpha=0.7)
            axes.plot(found.mean, number, _marker(number - 1), color=color, markersize=8)
        axes.axvline(0.5, color="0.5", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), [picture_text(r.row.name) for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _name(axes, "win rate over the base", None)
        axes.set_title(f"{kind} preference", loc="left")
        axes.grid(axis="x", color="0.9", linewidth=0.8)
    return figure


def draw_frontier(comparison: Comparison) -> Figure | None:
    trained = [r for r in comparison.main if r.trainings]
    gain, gain_label = _learned(comparison.judged)
    drift = retention(comparison.texts[0], "kl_per_token")
    if not trained:
        return None
    figure, [axes] = _figure(1)
    placed = [_dial(axes, number, result, drift, gain) for number, result in enumerate(trained)]
    placed += [
        _control(axes, result, drift, gain) for result in comparison.main[1:]
        if not result.trainings
    ]
    if not any(placed):  # none has moved at all: there is no frontier
        return None
    axes.axhline(0 if comparison.judged else 0.5, color="0.5", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    _name(axes, f"{_KL}, {picture_text(comparison.texts[0])}", gain_label)
    _legend(figure, axes)
    return figure


def draw_sweep(comparison: Comparison, name: str) -> Figure | None:
    points = comparison.sweep(name)
    if len(points) < 2:
        return None
    sweep = comparison.config["sweeps"][name]
    figure, panels = _figure(2)
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
        _line(axes, 0, *zip(*((value, x.mean) for value, x in found), strict=True),
              f"trained at this {sweep['option']}")
        for value, x in found:
            if x.low is not None:
                axes.plot([value, value], [x.low, x.high], color=_color(0), linewidth=1)
        if sweep["option"] in _DIALLED:
            alpha = comparison.config["methods"][sweep["of"]][_DIALLED[sweep["option"]]]
            dial = [
                (alpha / w, x.mean) for origin in comparison.results
                if origin.row.name == sweep["of"]
                for w, [x] in origin.dial(measure) if x and w > 0
            ]
            if dial:
                _line(axes, 1, *zip(*dial, strict=True),
                      f"{picture_text(sweep['of'])} by the dial: {alpha:g}/w")
        values = [value for value, _ in points]
        if any(isinstance(value, str) for value in values):
            axes.set_xlim(-0.5, len(values) - 0.5)
        elif min(values) > 0:
            axes.set_xscale("log")
        elif positive := [value for value in values if value > 0]:
            axes.set_xscale("symlog", linthresh=min(positive))
        _name(axes, sweep["option"], label)
    _log_scale(panels[1])
    _legend(figure, panels[0])
    return figure


def _learned(asked: bool) -> tuple[Measure, str]:
    """What was learned, and its name: the judged gain, or where nothing was asked the accuracy."""
    if asked:
        return judged("new", "gain"), _GAIN
    return preference("new", "preference_accuracy"), "accuracy by implicit reward"


# --- parts --------------------------------------------------------------------------------------


def _dial(axes: Axes, number: int, result: Result, x: Measure, y: Measure) -> bool:
    """Whether any of its points has a place on a logarithmic axis of x."""
    found = [(w, a, b) for w, (a, b) in result.dial(x, y) if a and b and a.mean > 0]
    color, marker = _color(number), _marker(number)
    axes.plot([a.mean for _, a, _ in found], [b.mean for _, _, b in found], _dashes(number),
              color=color, linewidth=1.2, alpha=0.8)
    seeds = [
        (x(run, point), y(run, point)) for run in result.runs for point in run["dial"]
        if point["strength"] == result.trained
    ]
    if len(seeds) > 1:
        axes.plot([a[0] for a, _ in seeds], [b[0] for _, b in seeds], ".", color=color,
                  markersize=5, alpha=0.7)
    for w, a, b in found:
        own = w == 1
        axes.plot(a.mean, b.mean, marker, color=color, markersize=9 if own else 6,
                  markerfacecolor=color if own else "white",
                  label=picture_text(result.row.name) if own else None)
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


def _line(
    axes: Axes, number: int, x: Sequence[float], y: Sequence[float], label: str
) -> None:
    axes.plot(x, y, _dashes(number), color=_color(number), marker=_marker(number), markersize=5,
              linewidth=1.5, label=label)


def _number(found: float | None) -> float:
    """As a curve takes it: what could not be measured is a gap."""
    return math.nan if found is None else found


def _range(curves: list[list[float]]) -> tuple[list[float], list[float]]:
    columns = list(zip(*curves, strict=True))
    return [min(c) for c in columns], [max(c) for c in columns]


def _log_scale(axes: Axes) -> None:
    """Of y, where anything can be shown on it: a run of few steps may not have moved at all."""
    if any(y > 0 for line in axes.lines for y in line.get_ydata()):
        axes.set_yscale("log")


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _dashes(number: int) -> str:
    return DASHES[number // len(COLORS) % len(DASHES)]


def _figure(panels: int, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it would pick a display and keep every figure open.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 if panels == 1 else 10.0, height), dpi=130, layout="constrained")
    found = figure.subplots(1, panels, squeeze=False)[0]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(found)


def _name(axes: Axes, x_label: str, y_label: str | None) -> None:
    axes.set_xlabel(x_label)
    if y_label is not None:
        axes.set_ylabel(y_label)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not labels:  # of runs that have not moved at all, a logarithmic axis shows none
        return
    most = 3 if figure.get_figwidth() < 8 else 5  # names of methods are long
    columns = min(most, len(labels))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns,
                  fontsize=9)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg"):]
