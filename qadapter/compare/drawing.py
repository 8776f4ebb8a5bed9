"""What the pictures of a comparison are drawn with.

Colours are Okabe and Ito's, told apart with any colour vision (but their yellow, too pale for a
line on white). Where there are more methods than colours, markers and dashes tell them apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
"""One more than colours, so that no pair of them comes back before the fifty-sixth method."""
_DIAMETERS = 1, 0.89, 0.89, 1.25, 1.25, 1.2, 1.2, 1.67
"""Of markers that cover as much as the first."""
DASHES = "-", "--", ":"


def line(
    axes: Axes, number: int, x: Sequence[float], y: Sequence[float], label: str
) -> None:
    axes.plot(x, y, marker_of(number) + dashes_of(number), color=color_of(number), markersize=5,
              linewidth=1.5, label=label)


def log_scale(axes: Axes) -> None:
    """Of y, where anything can be shown on it: a run of few steps may not have moved at all."""
    if any(y > 0 for line in axes.lines for y in line.get_ydata()):
        axes.set_yscale("log")


def color_of(number: int) -> str:
    return COLORS[number % len(COLORS)]


def marker_of(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def dashes_of(number: int) -> str:
    return DASHES[number // len(COLORS) % len(DASHES)]


def figure_of(panels: int, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it would pick a display and keep every figure open.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 if panels == 1 else 10.0, height), dpi=130, layout="constrained")
    found = figure.subplots(1, panels, squeeze=False)[0]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(found)


def name_axes(axes: Axes, x_label: str, y_label: str | None) -> None:
    axes.set_xlabel(x_label)
    if y_label is not None:
        axes.set_ylabel(y_label)


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not labels:  # of runs that have not moved at all, a logarithmic axis shows none
        return
    most = 3 if figure.get_figwidth() < 8 else 5
    for columns in range(min(most, len(labels)), 0, -1):  # names of methods are long
        placed = figure.legend(handles, labels, frameon=False, loc="outside lower center",
                               ncols=columns, fontsize=9)
        if columns == 1 or placed.get_window_extent().width <= figure.bbox.width:
            break
        placed.remove()
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))


def size_of(seconds: float) -> float:
    """Diameter of a point, in typographic points, whose area grows with the root of a training's
    processor seconds: 4.7 at 3 s, 20 at 1,000 s."""
    return 3.6 * max(seconds, 1.0) ** 0.25


def marker_size(number: int, diameter: float) -> float:
    """For a method's marker to cover as much as a circle of this diameter."""
    return diameter * _DIAMETERS[number % len(MARKERS)]


def size_legend(figure: Figure, seconds: Sequence[float], label: str) -> None:
    """What sizes mean, above the axes: round numbers that span those drawn."""
    from matplotlib.lines import Line2D

    low, high = (math.log10(max(x, 1.0)) for x in (min(seconds), max(seconds)))
    shown = sorted({_round(10 ** x) for x in (low, (low + high) / 2, high)})
    points = [
        Line2D([], [], linestyle="", marker="o", color="0.55", markersize=size_of(x)) for x in shown
    ]
    title = Line2D([], [], linestyle="")
    figure.legend([title, *points], [label, *(f"{x:,.0f}" for x in shown)], frameon=False,
                  loc="outside upper right", ncols=1 + len(points), fontsize=9, handletextpad=0.6)


def _round(x: float) -> float:
    """The nearest of 1, 3, 10, 30 and so on."""
    return min((factor * 10.0 ** n for n in range(7) for factor in (1, 3)),
               key=lambda nice: abs(math.log(nice / x)))


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg"):]
