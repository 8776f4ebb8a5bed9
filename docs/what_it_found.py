"""Rewrites the tables of docs/compare.md, docs/choosing.md and README.md, each between two
comments, from the committed comparisons.

    python docs/what_it_found.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qadapter.compare import Comparison, read_config, read_results
from qadapter.compare.against import Against, against
from qadapter.compare.measure import LEAST_ACCURACY, trusted
from qadapter.compare.page import Column, columns, equal_gain_cells, equal_gains
from qadapter.compare.results import Result, Spread, judged, retention
from qadapter.evaluation.bootstrap import Estimate
from qadapter.evaluation.report import format_value

sys.path.insert(0, str(Path(__file__).parent))
from what_serves_it import ROOT, put

PAGE, README = ROOT / "docs/compare.md", ROOT / "README.md"
CHOOSING = ROOT / "docs/choosing.md"
RESULTS = ROOT / "benchmarks/results/compare"
PROBES = ROOT / "benchmarks/results/exemplar_probe"
TESTED = (
    "hh", "dsp_academy", "dsp_business", "dsp_entertainment", "dsp_literature", "dsp_judged",
    "dsp_forget", "dsp_forget_lora", "gemma", "long_entertainment", "hh_margins",
)
CHOICES = "dsp_choices", "dsp_judged", "dsp_what_rates", "dsp_what", "dsp_keep"
"""Comparisons reported on their test split, and on the validation split, which choices are made by.
"""
ONE_SEED = "gemma", "long_entertainment", "hh_margins"
"""Of those tested; of the others each row has three seeds or is said to have one."""
DPO_OF_EACH = {"dsp_keep": ("DPO block", "DPO LoRA"), "dsp_what": ("DPO 2 linear",)}
"""Of the choices, those that are shown along the dial too, at the gain of these rows."""
SHOWN = (
    "accuracy_reward", "log_loss", "new_win_rate", "old_win_rate", "new_gain", "kl_new_answers",
)
HELD_IN_README = (
    ("Q-Adapter + built-in 30", None), ("Q-Adapter + built-in 30", 2.0),
    ("DPO + built-in 30", None), ("SFT", None), ("DPO + NLL", None), ("Best of 4", None),
    ("SDFT", None),
)
PLACES = {
    "head, block": "block learning_rate=0.0003",
    "head, linear": "linear learning_rate=0.0003",
    "LoRA, upper 2 blocks": "2 linear learning_rate=0.003",
    "LoRA, upper 4": "4 linear learning_rate=0.003",
    "LoRA, upper 8": "8 linear",
    "LoRA, all 30": "all linear learning_rate=0.0003",
    "LoRA, q and v of all 30": "all q,v learning_rate=0.0003",
}
ALPHAS = {
    "α 0.1, χ² 0.1": "Q-Adapter alpha=0.1", "α 0.3, χ² 0.1": "Q-Adapter",
    "α 1, χ² 0.1": "Q-Adapter alpha=1", "α 0.3, χ² 0": "Q-Adapter chi2_coef=0",
    "α 0.3, χ² 1": "Q-Adapter chi2_coef=1", "α 0.3, χ² 10": "Q-Adapter chi2_coef=10",
}
HELD_TO = {
    "4 blocks, 1e-3, nothing": "LoRA", "4 blocks, 1e-3, own 10": "LoRA + own 10",
    "4 blocks, 1e-3, built-in 30": "LoRA + built-in 30",
    "4 blocks, 1e-3, built-in 100": "LoRA + built-in 100",
    "4 blocks, 3e-3, built-in 30": "4 blocks + built-in 30",
    "2 blocks, 3e-3, built-in 30": "2 blocks + built-in 30",
}
"""What docs/choosing.md shows of dsp_what_rates, dsp_choices and dsp_keep, by names of its own."""


def comparison(name: str, split: str) -> Comparison:
    """A committed comparison, by the name of its file."""
    config = read_config(ROOT / f"benchmarks/compare/{name}.yaml")
    return read_results(config, RESULTS / name, split)


def table(found: Comparison, results: list[Result], keys: tuple[str, ...] = SHOWN) -> str:
    """Means over seeds, ± standard deviation between them."""
    shown = [
        c for c in columns(found)
        if c.key in keys or (keys is SHOWN and c.key.startswith("kl:"))
    ]
    lines = [f"| | {' | '.join(c.label for c in shown)} |", "| --- |" + " ---: |" * len(shown)]
    lines += [f"| {r.row.name} | {' | '.join(cell(r, c) for c in shown)} |" for r in results]
    return "\n".join(lines) + "\n"


def differences(found: Comparison) -> str:
    """Every row against the reference, pair by pair and prompt by prompt."""
    reference = found.reference
    lines = [
        "", f"Against {reference.row.name}, pair by pair and prompt by prompt, 95% intervals:", "",
        "| | accuracy | judged gain [SD] | KL ratio, " + " | KL ratio, ".join(found.texts) + " |",
        "| --- |" + " ---: |" * (2 + len(found.texts)),
    ]
    for result in found.main[1:]:
        if result is not reference:
            lines.append(difference(result.row.name, against(result, reference)))
    for result in found.main[1:]:
        for strength in result.strengths:
            # Where it moves answers more than as it was trained; no accuracy moves with it.
            if found.judged and strength > 1:
                beside = against(result, reference, strength)
                lines.append(difference(turned(result.row.name, strength), beside))
    return "\n".join(lines) + "\n"


def turned(name: str, strength: float | None) -> str:
    """A row at a setting of its dial; none or 1: as trained."""
    return name if strength in (None, 1) else f"{name}, strength {strength:g}"


def difference(name: str, row: Against) -> str:
    cells = [format_value(row.accuracy), format_value(row.gain, 2),
             *(format_value(x, 2) for x in row.kl_ratio.values())]
    return f"| {name} | {' | '.join(cells)} |"


def dial(found: Comparison) -> str:
    """Gain and KL together, at every setting of the dial."""
    rows = [r for r in found.main if len(r.strengths) > 1]
    strengths = sorted({w for r in rows for w in r.strengths})
    count = min(found.config["evaluation"]["dial_seeds"], len(found.config["seeds"]))
    seeds = "one seed" if count == 1 else f"{count} seeds"
    measures = judged("new", "gain"), *(retention(t, "kl_per_token") for t in found.texts)
    lines = [
        "", f"Along the dial ({seeds}): judged gain [SD] at KL on {', '.join(found.texts)}:", "",
        "| | " + " | ".join(f"strength {w:g}" for w in strengths) + " |",
        "| --- |" + " ---: |" * len(strengths),
    ]
    for result in rows:
        at = dict(result.dial(*measures))
        cells = [
            f"{at[w][0].mean:.2f} at " + ", ".join(f"{x.mean:.4f}" for x in at[w][1:])
            if at.get(w, [None])[0] else "—" for w in strengths
        ]
        lines.append(f"| {result.row.name} | {' | '.join(cells)} |")
    judges = "; ".join(f"{kind} preference, {', '.join(map(judge, of.items()))}"
                       for kind, of in found.judges.items())
    lines += ["", f"The judges rank so many of these prompts' own pairs right: {judges}."]
    return "\n".join(lines) + "\n"


def judge(found: tuple[str, dict[str, Any]]) -> str:
    """A judge's name and accuracy."""
    name, accuracy = found
    use = "" if trusted(accuracy) else f" (below {LEAST_ACCURACY:g}, not used)"
    return f"{name} {_interval(accuracy, 'accuracy')}{use}"


def equal_gain(found: Comparison, reference: str | None = None) -> str:
    """KL of every row where its dial gains what the reference, or the row of this name, gains as
    trained."""
    name = reference or found.config["reference"]
    rows = {} if name is None else equal_gains(
        found, next(r for r in found.results if r.row.name == name)
    )
    if not rows:
        return ""
    lines = [
        "", f"At {name}'s gain as trained: the setting of each dial that gains "
        "as much, and KL there over its; log KL taken as linear in the gain between two settings, "
        "95% intervals over prompts, texts and seeds:", "",
        "| | strength | KL ratio, " + " | KL ratio, ".join(found.texts) + " |",
        "| --- |" + " ---: |" * (1 + len(found.texts)),
    ]
    lines += [f"| {row} | {' | '.join(equal_gain_cells(x))} |" for row, x in rows.items()]
    return "\n".join(lines) + "\n"


def frontier_table(name: str, split: str = "test", *references: str) -> str:
    """A committed comparison's rows at their settings of the dial, and at the gain of its reference
    or of each of these rows (a DPO through each adapter)."""
    found = comparison(name, split)
    return dial(found) + "".join(equal_gain(found, row) for row in references or (None,))


def cell(result: Result, column: Column) -> str:
    value: Spread | None = result.number(column.measure)
    if value is None:
        return "—"
    spread = "" if value.sd is None else f" ± {value.sd:.{column.digits}f}"
    return f"{value.mean:.{column.digits}f}{spread}"


def probes() -> str:
    """What the exemplar probe said of a few runs (``qadapter eval RUN --exemplar_probe``), those
    that moved most first."""
    lines = [
        "| | KL, worked solutions | same top token | perplexity | right choice, MMLU's, change |",
        "| --- |" + " ---: |" * 4,
    ]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in PROBES.glob("*.json")]
    for found in sorted(runs, key=lambda x: -x["exemplar_probe"]["solutions"]["kl_per_token"]):
        solutions, [choice, *_] = (found["exemplar_probe"][k] for k in ("solutions", "measures"))
        name = Path(found["model"]).parent.name.replace("-", " ")
        cells = (
            _interval(solutions, "kl_per_token"), _interval(solutions, "top1_agreement"),
            f"{solutions['perplexity_base']:.2f} → {solutions['perplexity']:.2f}",
            _interval(choice, "change"),
        )
        lines.append(f"| {turned(name, found['strength'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(found: dict[str, Any], name: str) -> str:
    return format_value(Estimate(found[name], *found[f"{name}_ci"]))


def tables() -> dict[str, str]:
    """Every block of the page, by the comment before it."""
    blocks = {}
    for name in TESTED:
        found = comparison(name, "test")
        blocks[name] = table(found, found.main) + differences(found)
        if found.judged:
            blocks[name] += frontier_table(name)
    for name in CHOICES:
        found = comparison(name, "validation")
        blocks[f"{name} validation"] = table(found, found.results)
        if name in DPO_OF_EACH:
            blocks[f"{name} validation"] += frontier_table(name, "validation", *DPO_OF_EACH[name])
    return blocks | {"exemplar probe": probes()}


def readme_tables() -> dict[str, str]:
    """The few columns and rows the README has room for."""
    return {"held": in_short("dsp_forget_lora", HELD_IN_README, 3, 3)}


def choosing_tables() -> dict[str, str]:
    """The rows that a choice is between, of docs/choosing.md."""
    what, keep, choices = (
        comparison(name, "validation") for name in ("dsp_what_rates", "dsp_keep", "dsp_choices")
    )
    return {
        "where": some_rows(what, PLACES, ("accuracy_reward", "log_loss", "kl:unrelated text")),
        "alpha": some_rows(choices, ALPHAS, ("accuracy_reward", "log_loss", "kl:unrelated text")),
        "held to": some_rows(keep, HELD_TO, (
            "accuracy_reward", "new_gain", "kl:unrelated text", "kl:helpful answers",
        )),
        "along the dial": along_the_dial(keep, HELD_TO),
    }


def some_rows(found: Comparison, rows: Mapping[str, str], keys: tuple[str, ...]) -> str:
    by_name = {r.row.name: r for r in found.results}
    text = table(found, [by_name[name] for name in rows.values()], keys)
    for shown, name in rows.items():
        text = text.replace(f"\n| {name} |", f"\n| {shown} |", 1)
    return text


def along_the_dial(found: Comparison, rows: Mapping[str, str]) -> str:
    """Judged gain, at its KL on the comparison's first text, for some rows."""
    by_name, gain = {r.row.name: r for r in found.results}, judged("new", "gain")
    strengths = sorted({w for name in rows.values() for w in by_name[name].strengths})
    lines = [
        "| | " + " | ".join(f"strength {w:g}" for w in strengths) + " |",
        "| --- |" + " ---: |" * len(strengths),
    ]
    for shown, name in rows.items():
        at = dict(by_name[name].dial(gain, retention(found.texts[0], "kl_per_token")))
        cells = [f"{at[w][0].mean:.2f} at {at[w][1].mean:.4f}" if w in at else "—"
                 for w in strengths]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_short(
    name: str, rows: Sequence[tuple[str, float | None]], texts: int, digits: int
) -> str:
    """Rows of a judged comparison against its reference.

    Args:
        rows: and their setting of the dial, where it is not as trained.
        texts: on so many, the first ones, KL is shown, as a ratio of so many digits.
    """
    found = comparison(name, "test")
    by_name, reference = {r.row.name: r for r in found.results}, found.reference
    shown = found.texts[:texts]
    lines = [
        f"| against {reference.row.name} | accuracy | judged gain [SD] | KL, "
        + " | KL, ".join(shown) + " |", "| --- |" + " ---: |" * (2 + texts),
    ]
    for row, strength in rows:
        beside = against(by_name[row], reference, strength)
        cells = [format_value(beside.accuracy), format_value(beside.gain, 2),
                 *(f"× {format_value(beside.kl_ratio[text], digits)}"
                   for text in shown)]
        lines.append(f"| {turned(row, strength)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    for name, block in tables().items():
        put(PAGE, name, block)
    for name, block in choosing_tables().items():
        put(CHOOSING, name, block)
    for name, block in readme_tables().items():
        put(README, name, block)


if __name__ == "__main__":
    main()
