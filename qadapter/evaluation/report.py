"""Tables, pictures and the Markdown report of a run: base beside customised."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from qadapter.evaluation.bootstrap import Estimate
from qadapter.system.markup import markdown_table, markdown_text, visible
from qadapter.system.scratch import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qadapter.evaluation.preference import Calibration, PreferenceResult
    from qadapter.evaluation.retention import RetentionResult

Value = Estimate | float | int | str | None


class Row(NamedTuple):
    """One measure of a comparison. ``digits``: decimals shown; None values are shown as —."""

    measure: str
    base: Value
    customised: Value
    digits: int = 3


class Section(NamedTuple):
    """A part of a report. ``body`` is Markdown."""

    heading: str
    body: str


class Panel(NamedTuple):
    """One picture: curves of a run's log against its steps."""

    file_name: str
    title: str
    axis: str
    curves: dict[str, str]
    """Key in the log (without ``eval_``) → label."""
    level: float | None = None
    """A dotted line: what a model without a preference has."""


PANELS = (
    Panel("loss.png", "Loss", "loss [nats a pair]", {"loss": "whole loss"}),
    Panel(
        "preference_accuracy.png", "Pairs ranked right by implicit reward", "share of pairs",
        {"rewards/accuracies": "accuracy"}, 0.5,
    ),
    Panel(
        "reward_margins.png", "Reward of the chosen minus the rejected answer", "margin [nats]",
        {"rewards/margins": "margin"}, 0.0,
    ),
    Panel(
        "kl.png", "Distance from the base", "KL [nats a token]",
        {
            "kl_base_policy": "KL(base‖customised), answers",
            "kl_policy_base": "KL(customised‖base), answers",
            "retention_kl": "KL(base‖customised), retention texts",
        },
    ),
)


# --- tables -----------------------------------------------------------------------------------


def preference_rows(result: PreferenceResult) -> list[Row]:
    """Accuracies, margins, calibration. A plain model fills the base's column only."""
    rows = []
    for suffix, how in (("", ""), ("_mean", ", mean a token"),
                        ("_length_controlled", ", length-controlled")):
        policy = getattr(result, f"preference_accuracy_policy{suffix}")
        reward = getattr(result, f"preference_accuracy{suffix}")
        base = getattr(result, f"preference_accuracy_base{suffix}")
        if reward is not None:
            rows.append(Row(f"accuracy by reward{how}", None, reward))
        rows.append(Row(f"accuracy by log-probability{how}", base, policy))
    # All of one kind together, the headline first.
    rows.sort(key=lambda row: "by reward" not in row.measure)
    if result.reward_margin is not None:
        rows.append(Row("reward margin (nats)", None, result.reward_margin, 2))
    rows.append(
        Row("log-probability margin (nats)", result.base_margin, result.policy_margin, 2)
    )
    if result.calibration is not None:
        rows += [
            Row("calibration error of σ(margin)", None,
                result.calibration.expected_calibration_error),
            Row("log loss of σ(margin) (nats)", None, result.calibration.log_loss),
        ]
    if result.answer_kl_per_token is not None:
        rows.append(
            Row("KL(base‖customised), these answers", None,
                result.answer_kl_per_token, 4)
        )
    return rows


def baseline_note(result: PreferenceResult) -> str:
    """What needs no model at all; belongs under every table of accuracies."""
    return (
        f"{result.num_pairs:,} pairs, {result.num_prompts:,} prompts; brackets: 95% intervals, "
        "bootstrap over prompts; KL in nats a token. Without any model: the longer answer wins "
        f"{result.longer_wins.value:.3f}, the shorter {result.shorter_wins.value:.3f}, "
        f"a coin {result.random_baseline:.3f}."
    )


def retention_rows(result: RetentionResult, where: str = "texts") -> list[Row]:
    """Divergences and perplexities on texts called ``where``; divergences stand in the customised
    model's column."""
    rows = [
        Row(f"KL(base‖customised), {where}", None, result.kl_per_token, 4),
        Row(f"KL(customised‖base), {where}", None,
            result.kl_policy_base_per_token, 4),
        Row(f"same top token, {where}", None, result.top1_agreement),
        Row(f"perplexity, {where}", result.perplexity_base, result.perplexity, 2),
    ]
    return [row for row in rows if not row.base is row.customised is None]


def answer_rows(base: Mapping[str, float], customised: Mapping[str, float] | None) -> list[Row]:
    """``answer_statistics`` of both models' answers to the same prompts."""
    measures = {
        "words_mean": ("words an answer, mean", 1),
        "tokens_mean": ("tokens an answer, mean", 1),
        "share_ended": ("answers that end by themselves", 3),
        "distinct_1": ("distinct words", 3),
        "distinct_2": ("distinct word pairs", 3),
        "distinct_3": ("distinct word triples", 3),
    }
    return [
        Row(label, base.get(key), None if customised is None else customised.get(key), digits)
        for key, (label, digits) in measures.items()
    ]


def format_value(value: Value, digits: int = 3) -> str:
    """``0.912 [0.871, 0.950]``; — for None."""
    if value is None:
        return "—"
    if isinstance(value, str):
        return value
    if not isinstance(value, Estimate):
        return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"
    if value.value != value.value:
        return "—"
    text = f"{value.value:.{digits}f}"
    if value.low == value.low:
        text += f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return text


def comparison_table(
    rows: Sequence[Row], *, title: str | None = None, note: str | None = None
) -> Table:
    """A rich table: measure, base, customised."""
    # Texts, not strings: names of files are no markup on any console.
    table = Table(
        title=title and Text(visible(title), style="table.title"),
        caption=note and Text(note, style="table.caption"),
        caption_justify="left", title_justify="left",
    )
    table.add_column("measure")
    table.add_column("base", justify="right")
    table.add_column("customised", justify="right")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row_cells(row)))
    return table


def comparison_markdown(rows: Sequence[Row], *, note: str | None = None) -> str:
    """The same table in Markdown."""
    table = markdown_table(("measure", "base", "customised"), map(row_cells, rows), "lrr")
    return table + (f"\n\n{note}" if note else "")


def row_cells(row: Row) -> tuple[str, str, str]:
    """Measure, base, customised, as tables show them."""
    return (
        row.measure, format_value(row.base, row.digits), format_value(row.customised, row.digits)
    )


def in_words(options: Mapping[str, Any]) -> str:
    """``kind head, form linear, rank 128``; without what is None or empty."""
    return ", ".join(
        f"{name} {value}" for name, value in options.items() if value not in (None, [], {}, "")
    )


# --- files ------------------------------------------------------------------------------------


def write_text(path: str | Path, text: str) -> None:
    """Replace a file whole, or leave it as it was.

    Halves of characters, which names of files may hold, are written as escapes (``\\udc80``; in
    JSON that is the same text again): what was measured is not lost by one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Indented JSON; NaN is refused (ValueError), as it is no JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_metrics_jsonl(path: str | Path, log_history: Sequence[Mapping[str, Any]]) -> None:
    """A trainer's ``state.log_history``, one JSON object a line."""
    write_json_lines(path, log_history)


def write_json_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line; null where a number is NaN or infinite, which JSON does not know."""
    def known(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_text(path, "".join(
        json.dumps({key: known(value) for key, value in row.items()}) + "\n" for row in rows
    ))


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """A Markdown report: a title, which is text, and its sections."""
    parts = [f"# {markdown_text(title)}"]
    parts += [f"## {section.heading}\n\n{section.body.strip()}" for section in sections]
    write_text(path, "\n\n".join(parts) + "\n")


def pictures_markdown(paths: Sequence[Path], report_path: str | Path) -> str:
    """Links to pictures, relative to the report."""
    folder = Path(report_path).parent
    return "\n".join(
        f"![{path.stem.replace('_', ' ')}]({Path(os.path.relpath(path, folder)).as_posix()})"
        for path in paths
    )


# --- pictures ---------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_labels() -> Iterator[None]:
    """Labels of the pictures drawn in it are text, whatever the user's own settings of matplotlib
    are: not TeX, and text in SVG, where it can be searched and read out."""
    import matplotlib

    with matplotlib.rc_context({"text.usetex": False, "svg.fonttype": "none"}):
        yield


@plain_labels()
def plot_training_curves(
    log_history: Sequence[Mapping[str, Any]], out_dir: str | Path
) -> list[Path]:
    """Pictures of loss, preference accuracy, margins and KL against training steps.

    Training as a line, evaluation (keys ``eval_…``) as a line with points. A picture none of whose
    curves is in the log is left out.

    Args:
        log_history: a trainer's ``state.log_history``, or the lines of ``metrics.jsonl``.

    Returns:
        The PNG files written, in a fixed order.
    """
    written = []
    for panel in PANELS:
        curves = curves_of(panel, log_history)
        if not curves:
            continue
        axes = _new_axes(panel.title, "training step", panel.axis)
        colors = {label: f"C{i}" for i, label in enumerate(panel.curves.values())}
        many = len({label for label, _ in curves}) > 1
        for (label, held_out), points in curves.items():
            split = "held out" if held_out else "training"
            axes.plot(
                *zip(*points, strict=True), color=colors[label],
                label=f"{label}, {split}" if many else split,
                **({"marker": "o", "markersize": 5, "linewidth": 2} if held_out
                   else {"alpha": 0.6, "linewidth": 1.2}),
            )
        if panel.level is not None:
            axes.axhline(panel.level, color="0.5", linestyle=":", linewidth=1,
                         label="no preference")
        axes.legend(frameon=False)
        written.append(_save(axes, Path(out_dir) / panel.file_name))
    return written


@plain_labels()
def plot_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Reliability diagram: how often pairs ranked with a confidence are ranked right."""
    axes = _new_axes(
        "Calibration of the reward margin", "confidence σ(|reward margin|)", "share ranked right"
    )
    bins = [b for b in calibration.bins if b.count]
    largest = max((b.count for b in bins), default=1)
    axes.plot([0.5, 1], [0.5, 1], color="0.5", linestyle=":", label="calibrated")
    axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], color="C0", linewidth=1)
    axes.scatter(
        [b.confidence for b in bins], [b.accuracy for b in bins], color="C0",
        s=[20 + 130 * b.count / largest for b in bins], label="pairs (area: how many)",
    )
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, loc="lower right")
    return _save(axes, Path(path))


def curves_of(
    panel: Panel, log_history: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """(label, held out) → (step, number) of what is in the log; curves without a point are none."""
    curves = {
        (label, bool(prefix)): _curve(log_history, prefix + key)
        for key, label in panel.curves.items()
        for prefix in ("", "eval_")
    }
    return {name: points for name, points in curves.items() if points}


def _curve(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    def drawable(value: Any) -> bool:
        # A callback of the user's may have logged what is no number; arithmetic on the
        # largest overflows.
        return isinstance(value, int | float) and abs(value) < 1e100

    return [(entry["step"], entry[key]) for entry in log_history
            if drawable(entry.get("step")) and drawable(entry.get(key))]


def _new_axes(title: str, x_label: str, y_label: str) -> Axes:
    # Not pyplot: it would pick a display and keep every figure open.
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained").add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _save(axes: Axes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as written:
        axes.figure.savefig(written)
    return path
