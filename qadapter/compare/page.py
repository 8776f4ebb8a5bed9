"""The report as one file with tables and pictures, no network and no script; and its numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qadapter.compare.against import Against, EqualGain, against, at_equal_gain
from qadapter.compare.measure import LEAST_ACCURACY, trusted
from qadapter.compare.pictures import Picture, draw_all
from qadapter.compare.results import (
    Comparison,
    Measure,
    Result,
    Spread,
    answers,
    judged,
    policy_accuracy,
    preference,
    retention,
    spread,
)
from qadapter.evaluation.html_page import STYLE, html_page
from qadapter.evaluation.report import format_value, write_json, write_text
from qadapter.system.markup import html_text

_STYLE = STYLE + """
body { max-width: 80rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { max-width: 60rem; }
.dim, figcaption { color: var(--dim); font-size: .92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
th { font-weight: 600; }
figure { margin: 1rem 0 2rem; }
/* Pictures are drawn for white paper. */
figure svg { max-width: 100%; height: auto; background: #fff; border-radius: .25rem; }
pre { background: var(--card); padding: 1rem; overflow-x: auto; font-size: .82rem; }
"""


class Column(NamedTuple):
    key: str
    label: str
    measure: Measure
    digits: int = 3


def columns(comparison: Comparison) -> list[Column]:
    """What the main table shows."""
    texts, kinds = comparison.texts, list(comparison.judges)
    found = [
        Column("accuracy_reward", "accuracy, implicit reward",
               preference("new", "preference_accuracy")),
        Column("accuracy_reward_length_controlled", "… length-controlled",
               preference("new", "preference_accuracy_length_controlled")),
        Column("log_loss", "log loss of σ(margin)", preference("new", "log_loss")),
        Column("accuracy_policy_mean", "accuracy, log-probability a token",
               policy_accuracy("new")),
    ]
    if "old" in kinds:
        found.append(Column("old_accuracy_policy_mean", "… on the old preference",
                            policy_accuracy("old")))
    heard = comparison.judged_kinds
    found += [Column(f"{kind}_win_rate", f"win rate, {kind}", judged(kind, "win_rate"))
              for kind in heard]
    found += [Column(f"{kind}_gain", f"judged gain, {kind} [SD]", judged(kind, "gain"), 2)
              for kind in heard]
    for name in texts:
        found.append(Column(f"kl:{name}", f"KL, {name}", retention(name, "kl_per_token"), 4))
    if comparison.sampled:
        found.append(
            Column("kl_new_answers", "KL, its own answers", answers("new", "kl_of_own_answers"), 4)
        )
    found += [
        Column(f"top1:{texts[0]}", f"same top token, {texts[0]}",
               retention(texts[0], "top1_agreement")),
        Column(f"perplexity:{texts[0]}", f"perplexity, {texts[0]}", _perplexity(texts[0]), 2),
    ]
    if comparison.sampled:
        found += [
            Column("words", "words an answer", answers("new", "statistics", "words_mean"), 1),
            Column("distinct_3", "distinct word triples",
                   answers("new", "statistics", "distinct_3")),
        ]
    return found


def _perplexity(texts: str) -> Measure:
    def number(run, point):
        side = "perplexity_base" if point["strength"] == 0 else "perplexity"
        return retention(texts, side)(run, point)

    return number


def write_report(comparison: Comparison, folder: str | Path) -> Path:
    """Write ``report-SPLIT.html``, ``summary-SPLIT.json`` and the pictures; returns the page."""
    folder = Path(folder)
    pictures = draw_all(comparison, folder / f"pictures-{comparison.split}")
    write_json(folder / f"summary-{comparison.split}.json", summary(comparison))
    path = folder / f"report-{comparison.split}.html"
    write_text(path, page(comparison, pictures))
    return path


def summary(comparison: Comparison) -> dict[str, Any]:
    """The main table as JSON types: row → column → mean, sd, low, high."""
    shown, reference = columns(comparison), comparison.reference
    return {
        "title": comparison.title, "split": comparison.split,
        "judges": comparison.judges,
        "judges_left_out": [[kind, name] for kind, name, _ in comparison.left_out],
        "test_touched": comparison.touched,
        "rows": {
            r.row.name: {
                "method": r.row.method.kind if r.row.method else "base",
                "seeds": [run["seed"] for run in r.runs if "seed" in run],
                **{c.key: x._asdict() for c in shown if (x := r.number(c.measure)) is not None},
            }
            for r in comparison.results
        },
        "length_baseline": _length_baseline(comparison),
        "reference": reference and reference.row.name,
        "against_reference": {} if reference is None else {
            r.row.name: _against_as_dict(against(r, reference))
            for r in comparison.results if r is not reference
        },
        "at_equal_gain": {
            name: _equal_as_dict(found) for name, found in equal_gains(comparison).items()
        },
    }


def _against_as_dict(found: Against) -> dict[str, Any]:
    flat = found.accuracy.as_dict("accuracy") | found.gain.as_dict("gain")
    for name, ratio in found.kl_ratio.items():
        flat |= ratio.as_dict(f"kl_ratio:{name}")
    return flat


def equal_gains(
    comparison: Comparison, reference: Result | None = None
) -> dict[str, EqualGain]:
    """Row → its KL at the reference's gain (or another row's); without the rows of which nothing
    can be said."""
    reference = reference or comparison.reference
    if reference is None:
        return {}
    found = {
        r.row.name: at_equal_gain(r, reference)
        for r in comparison.results if r is not reference
    }
    return {name: x for name, x in found.items() if x is not None}


def _equal_as_dict(found: EqualGain) -> dict[str, Any]:
    reached = math.isfinite(found.strength)
    flat = {
        "reached": reached, "strength": found.strength if reached else None,
        "at_most": found.at_most,
    }
    for name, ratio in found.kl_ratio.items():
        flat |= ratio.as_dict(f"kl_ratio:{name}")
    return flat


def equal_gain_cells(found: EqualGain) -> list[str]:
    """The setting of the dial and the ratio of KL on each text, as a table shows them."""
    if math.isinf(found.strength):
        return ["not reached", *("—" for _ in found.kl_ratio)]
    bound = "≤ " if found.at_most else ""
    return [f"{bound}{found.strength:.2f}", *(
        bound + (f"{x.value:.2f} [{x.low:.2f}, not reached]" if math.isinf(x.high)
                 else format_value(x, 2))
        for x in found.kl_ratio.values()
    )]


def _length_baseline(comparison: Comparison) -> dict[str, Any]:
    found = comparison.results[0].runs[0]["preferences"]
    return {
        kind: {name: numbers[name] for name in ("longer_wins", "shorter_wins", "random_baseline")}
        for kind, numbers in found.items()
    }


def page(comparison: Comparison, pictures: Sequence[Picture]) -> str:
    """The report, as HTML."""
    results, shown = comparison.results, columns(comparison)
    parts = [
        f"<h1>{html_text(comparison.title)}</h1>",
        f'<p class="dim">{html_text(_subtitle(comparison))}</p>',
        "<h2>What was learned, what was kept</h2>",
        _table(["", *(c.label for c in shown)], [
            [r.row.name, *(_cell(r.number(c.measure), c.digits) for c in shown)]
            for r in comparison.main
        ]),
        f'<p class="dim">{html_text(_note(comparison))}</p>',
        *_against(comparison),
        *_equal_gain(comparison),
        *(_figure(p) for p in pictures),
        *(["<h2>Each judge apart</h2>", _judges(comparison)] if comparison.sampled else []),
        "<h2>The dial</h2>", _dial(comparison, shown),
    ]
    if comparison.config["sweeps"]:
        parts += ["<h2>Sweeps</h2>", _table(["", *(c.label for c in shown)], [
            [r.row.name, *(_cell(r.number(c.measure), c.digits) for c in shown)]
            for r in results if r.row.sweep is not None
        ])]
    parts += ["<h2>Training</h2>", _training(results), "<h2>Configuration</h2>",
              f"<pre>{html_text(yaml.safe_dump(comparison.config, sort_keys=False))}</pre>",
              "<h2>Machine and versions</h2>",
              f"<pre>{html_text(yaml.safe_dump(results[0].runs[0]['environment']))}</pre>"]
    return html_page(comparison.title, _STYLE, "\n".join(parts))


def _subtitle(comparison: Comparison) -> str:
    config = comparison.config
    times = Counter((touch["name"], touch["seed"]) for touch in comparison.touched)
    again = ", ".join(f"{name} seed {seed}" for (name, seed), n in times.items() if n > 1)
    touched = f"; scored on it more than once: {again or 'no run'}"
    seeds = ", ".join(map(str, config["seeds"]))
    return (
        f"Base {config['model_name_or_path']}; {comparison.split} split; seeds {seeds}"
        + (touched if comparison.split == "test" else "")
    )


def _note(comparison: Comparison) -> str:
    lengths = "; ".join(
        f"{kind} preference: the longer answer wins {x['longer_wins']:.3f}, the shorter "
        f"{x['shorter_wins']:.3f}, a coin {x['random_baseline']:.3f}"
        for kind, x in _length_baseline(comparison).items()
    )
    return (
        "Means over training seeds; ± standard deviation between them; brackets: the mean of the "
        "runs' 95% intervals, bootstrap over prompts or texts. KL is KL(base‖customised) in nats a "
        "token (of its own answers: KL(customised‖base) at their states). Win rate and gain are "
        "over the base's own answers, by the judges together, trained on pairs no policy saw; a "
        "gain is in standard deviations of the base's scores. The row base is another draw of the "
        f"base's: what no change at all looks like. Without any model: {lengths}. "
        + judges_left_out(comparison)
    )


def judges_left_out(comparison: Comparison) -> str:
    """Which judges are not used, and why, as a sentence; empty where all are."""
    if not comparison.left_out:
        return ""
    names = "; ".join(
        f"{name} ({kind} preference), which ranks "
        f"{'no' if accuracy is None else f'{accuracy:.3f}'} of the split's own pairs right"
        for kind, name, accuracy in comparison.left_out
    )
    none = "" if comparison.judged else ", so that no gain is shown"
    return f"Judges below {LEAST_ACCURACY:g} are not used{none}: {names}."


def _judges(comparison: Comparison) -> str:
    header, rows = ["", "judge", "win rate", "gain [SD]"], []
    blocks = []
    for kind, judges in comparison.judges.items():
        for judge, accuracy in judges.items():
            rows = [
                [r.row.name, judge, _cell(r.number(judged(kind, "win_rate", judge)), 3),
                 _cell(r.number(judged(kind, "gain", judge)), 2)]
                for r in comparison.main
            ]
            ranked = spread([(accuracy["accuracy"], accuracy["accuracy_ci"])])
            told = (f"{html_text(kind)} preference, {html_text(judge)}: ranks "
                    f"{_cell(ranked, 3)} of the split's own pairs right")
            if trusted(accuracy):
                blocks += [f"<p>{told}.</p>", _table(header, rows)]
            else:
                blocks.append(f"<p>{told}: less than {LEAST_ACCURACY:g}, so it is not used.</p>")
    return "\n".join(blocks)


def _against(comparison: Comparison) -> list[str]:
    reference = comparison.reference
    if reference is None:
        return []
    rows = []
    for result in comparison.results:
        if result is not reference:
            found = against(result, reference)
            rows.append([
                result.row.name, format_value(found.accuracy), format_value(found.gain, 2),
                *(format_value(x, 2) for x in found.kl_ratio.values()),
            ])
    header = ["", "accuracy, implicit reward", "judged gain, new [SD]",
              *(f"KL ratio, {name}" for name in comparison.texts)]
    return [
        f"<h2>Against {html_text(reference.row.name)}</h2>", _table(header, rows),
        '<p class="dim">Differences, and ratios of KL(base‖customised), pair by pair and prompt by '
        "prompt; means over seeds; brackets: 95% intervals, bootstrap over prompts or texts. The "
        "noise of the training is not in them: see ± above.</p>",
    ]


def _equal_gain(comparison: Comparison) -> list[str]:
    found, reference = equal_gains(comparison), comparison.reference
    if not found:
        return []
    header = ["", "strength", *(f"KL ratio, {name}" for name in comparison.texts)]
    return [
        f"<h2>At the gain of {html_text(reference.row.name)}</h2>",
        _table(header, [[name, *equal_gain_cells(x)] for name, x in found.items()]),
        '<p class="dim">Where each row\'s dial gains what the reference gains as trained: between '
        "the two settings where it does so first, log KL taken as linear in the gain; ≤: its "
        "lowest setting gains more already. Brackets: 95% intervals, bootstrap over prompts, texts "
        "and training seeds; not reached: in more than 2.5% of the resamples no setting gains as "
        "much.</p>",
    ]


def _dial(comparison: Comparison, shown: Sequence[Column]) -> str:
    moving = [c for c in shown if "accuracy" not in c.key]
    header, reference = ["", "strength", *(c.label for c in moving)], comparison.reference
    if reference is not None:
        header += [f"gain against {reference.row.name} [SD]",
                   *(f"KL ratio, {name}" for name in comparison.texts)]
    rows = []
    for result in comparison.main:
        if len(result.strengths) < 2:
            continue
        for strength, found in result.dial(*(c.measure for c in moving)):
            cells = [_cell(x, c.digits) for x, c in zip(found, moving, strict=True)]
            if reference is not None:
                beside = against(result, reference, strength)
                cells += [format_value(x, 2) for x in (beside.gain, *beside.kl_ratio.values())]
            rows.append([result.row.name, f"{strength:g}", *cells])
    return _table(header, rows)


def _training(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for t in result.trainings:
            options = {k: v for k, v in t["options"].items() if v is not None}
            rows.append([
                result.row.name, str(t["seed"]), t["trained_by"], f"{t['steps']:,}",
                f"{t['tokens']:,}", f"{t['trainable_parameters']:,}", f"{t['seconds']:.0f}",
                f"{t['processor_seconds']:.0f}",
                ", ".join(f"{k} {v}" for k, v in options.items()),
            ])
    return _table(
        ["", "seed", "trained by", "steps", "tokens seen", "trainable parameters", "seconds",
         "processor seconds", "options"], rows,
    )


def _cell(found: Spread | None, digits: int) -> str:
    if found is None:
        return "—"
    text = f"{found.mean:.{digits}f}"
    if found.sd is not None:
        text += f" ± {found.sd:.{digits}f}"
    if found.low is not None:
        text += f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html_text(x)}</th>" for x in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html_text(x)}</td>" for x in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _figure(picture: Picture) -> str:
    return (f"<figure>\n{picture.svg}\n<figcaption>{html_text(picture.caption)}</figcaption>\n"
            "</figure>")
