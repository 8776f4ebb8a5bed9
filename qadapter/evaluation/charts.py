"""Curves as SVG inside a page: its colors, light and dark, and their numbers in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qadapter.evaluation.preference import Calibration
from qadapter.evaluation.report import PANELS, curves_of
from qadapter.system.markup import html_text

STYLE = """
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit,
  minmax(min(21rem, 100%), 1fr)); }
.charts figure { margin: 0; min-width: 0; max-width: 36rem; }
.charts figcaption { font-weight: 600; }
.charts svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif;
  --c0: rgb(var(--more)); --c1: #b45309; --c2: #15803d; }
.charts text { fill: var(--dim); }
.charts .grid { stroke: var(--line); }
.charts .level { stroke: var(--dim); stroke-dasharray: 2 3; }
.charts polyline { fill: none; stroke-linejoin: round; }
.charts .thin { stroke-width: 1.3; opacity: .75; }
.charts .thick { stroke-width: 2.2; }
.charts .keys { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; }
.charts .keys svg { width: 1.8rem; display: inline-block; vertical-align: middle;
  margin-right: .3rem; }
.charts table { font-size: .8rem; }
@media (prefers-color-scheme: dark) {
  .charts svg { --c0: #7fb0ff; --c1: #f5a45d; --c2: #5fd38a; }
}
"""
"""After ``html_page.STYLE``."""

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 8, 22, 38
_TICKS = 5
_MOST_POINTS = 300
"""Of a curve that is drawn: more could not be seen."""
_MOST_ROWS = 40
"""Of a table of numbers."""
_DASHES = ("", "7 3", "2 3")


class Curve(NamedTuple):
    """One line. ``marked``: thick, with its points, as held-out numbers are; else thin."""

    label: str
    points: Sequence[tuple[float, float]]
    marked: bool = False
    color: int = 0


def training_charts(log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    """``report.PANELS`` of a trainer's ``state.log_history``, those of which something was logged.
    """
    charts = []
    for panel in PANELS:
        found = curves_of(panel, log_history)
        many = len(panel.curves) > 1
        colors = {label: i for i, label in enumerate(panel.curves.values())}
        curves = [
            Curve(f"{label}, {split}" if many else split, points, held_out, colors[label] * many)
            for (label, held_out), points in found.items()
            for split in ("held out" if held_out else "training",)
        ]
        if curves:
            charts.append(chart(panel.title, "training step", panel.axis, curves, panel.level))
    return charts


def calibration_chart(calibration: Calibration) -> str:
    """How often pairs ranked with a confidence are ranked right."""
    bins = [b for b in calibration.bins if b.count]
    return chart(
        "Calibration of the reward margin", "confidence σ(|reward margin|)", "share ranked right",
        [Curve("calibrated", [(0.5, 0.5), (1.0, 1.0)], color=1),
         Curve("held out", [(b.confidence, b.accuracy) for b in bins], True)],
    )


def chart(
    title: str, x_label: str, y_label: str, curves: Sequence[Curve], level: float | None = None
) -> str:
    """A figure: the picture, what its lines are, and their numbers.

    Args:
        curves: each with at least one point; all numbers finite.
        level: a dotted line, what a model without a preference has.
    """
    curves = [c._replace(points=_thinned(c.points, _MOST_POINTS)) for c in curves]
    xs = [x for c in curves for x, _ in c.points]
    ys = [y for c in curves for _, y in c.points] + ([] if level is None else [level])
    y_ticks = _ticks(min(ys), max(ys))
    x_ticks = _ticks(min(xs), max(xs), least=float(all(float(x).is_integer() for x in xs)))
    x_low, x_high = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    y_low, y_high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return (_LEFT + right * (_WIDTH - _LEFT - _RIGHT),
                _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM))

    parts = [f'<text x="0" y="11">{html_text(y_label)}</text>']
    for tick in y_ticks:
        x, y = at(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        x, y = at(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{y + 15:.1f}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">'
                 f"{html_text(x_label)}</text>")
    if level is not None:
        x, y = at(x_low, level)
        parts.append(f'<line class="level" x1="{x:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/>')
    for c in curves:
        parts.append(_line(c, [at(*point) for point in c.points], [
            f"{c.label}: {y:.4g} at {x:g}" for x, y in c.points
        ]))
    keys = "".join(
        f'<span><svg viewBox="0 0 30 10" aria-hidden="true">'
        f"{_line(c, [(0, 5), (15, 5), (30, 5)], ['', '', ''], only=1)}</svg>"
        f"{html_text(c.label)}</span>" for c in curves
    )
    if level is not None:
        keys += ('<span><svg viewBox="0 0 30 10" aria-hidden="true"><line class="level" x1="0" '
                 'x2="30" y1="5" y2="5"/></svg>no preference</span>')
    return (
        f"<figure>\n<figcaption>{html_text(title)}</figcaption>\n"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_said(title, curves)}">'
        f'{"".join(parts)}</svg>\n<div class="keys dim">{keys}</div>\n'
        f"{_numbers(x_label, curves)}\n</figure>"
    )


def _line(
    curve: Curve, places: Sequence[tuple[float, float]], titles: Sequence[str],
    only: int | None = None,
) -> str:
    """Args: only: the one place that is marked."""
    color, dash = f"var(--c{curve.color})", _DASHES[curve.color]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    line = (f'<polyline class="{"thick" if curve.marked else "thin"}" stroke="{color}"{dashed} '
            f'points="{points}"/>')
    if not curve.marked and len(places) > 1:
        return line
    return line + "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{color}">'
        f"<title>{html_text(title)}</title></circle>"
        for i, ((x, y), title) in enumerate(zip(places, titles, strict=True)) if only in (None, i)
    )


def _said(title: str, curves: Sequence[Curve]) -> str:
    """The picture, for those who can't see it."""
    parts = [
        f"{c.label} from {c.points[0][1]:.4g} at {c.points[0][0]:g} to {c.points[-1][1]:.4g} at "
        f"{c.points[-1][0]:g}" for c in curves
    ]
    return html_text(f"{title}: {'; '.join(parts)}")


def _numbers(x_label: str, curves: Sequence[Curve]) -> str:
    columns = [dict(_thinned(c.points, _MOST_ROWS)) for c in curves]
    names = (x_label, *(c.label for c in curves))
    header = "".join(f"<th>{html_text(name)}</th>" for name in names)
    rows = "\n".join(
        f'<tr><td class="number">{x:g}</td>' + "".join(
            f'<td class="number">{format(column[x], ".4g") if x in column else ""}</td>'
            for column in columns
        ) + "</tr>"
        for x in sorted({x for column in columns for x in column})
    )
    return (f'<details><summary>the numbers</summary>\n<div class="wide"><table><tr>{header}</tr>\n'
            f"{rows}</table></div></details>")


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """So many of them, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[i * (len(points) - 1) // (most - 1)] for i in range(most)]


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers that lie in a range or, where it is none, around it; ``least`` apart."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        around = 0.1 * abs(low) or 1.0
        low, high = low - around, high + around
    rough = max((high - low) / _TICKS, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s for s in (power, 2 * power, 5 * power, 10 * power) if s >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]
