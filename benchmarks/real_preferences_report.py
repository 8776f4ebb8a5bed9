"""results/real_preferences.md from the JSON lines beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Row = dict[str, Any]
TITLES = {
    "dsp": "DSP: academy's answer against another domain's",
    "hh": "HH-RLHF harmless",
}
NOTES = """\
Accuracies count the pairs whose preferred answer scores higher, a tie as one half; ± is one
standard error, clustered by prompt. *Implicit reward*: summed over the answer's tokens, as trained.
*Length*: the longer or the shorter answer, whichever is preferred more often in training.
*Length-controlled*: the mean of the accuracies where the preferred answer is the longer one and
where it is the shorter one. KL(base‖customised) and perplexity are per token, in float32, on 1,500
states of each of these: held-out answers of the same data; HH-RLHF helpful answers (no part of any
training); texts of four genres, of which the retention term saw none (it has four others).
The split by prompt has a seed of its own. Every choice below was made on the validation split: the
highest accuracy by implicit reward with KL ≤ 0.03 on HH-RLHF helpful answers. The test split was
scored once, for that configuration. Rewards come from bfloat16 products, as in training.

Limits: the data are cut to what a slow, shared machine could do in an hour: answers end at the
length given below, and HH-RLHF prompts that leave no room are left out. The validation tables list
all that was tried, little for DSP. The bound on KL was first meant for held-out answers; it was
moved to helpful answers, those of the prototype's figures, after DSP's first validation run (0.035
on its own answers), before any test score.

Other jobs had a share of the machine: processor seconds are the ones to compare.
"""


def write_report(folder: Path) -> None:
    """Nothing where there are no lines yet."""
    lines = folder / "real_preferences.jsonl"
    if not lines.exists():
        return
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    parts = ["# Real preferences, head Q-Adapters\n", NOTES]
    for name, title in TITLES.items():
        own = [row for row in rows if row["data"] == name]
        if own:
            parts.append(f"## {title}\n")
            parts += [_data(own), _final(own), _search(own)]
    parts.append(_environment(rows))
    text = "\n".join(part for part in parts if part)
    (folder / "real_preferences.md").write_text(text, encoding="utf-8")


def _step(rows: Sequence[Row], step: str) -> list[Row]:
    return [row for row in rows if row["step"] == step]


def _data(rows: Sequence[Row]) -> str:
    features = _step(rows, "features")
    if not features:
        return ""
    sizes = "; ".join(
        f"{row['part']} {row['pairs']} pairs of {row['prompts']} prompts" for row in features
    )
    cpu = sum(row["feature_cpu_seconds"] for row in features)
    wall = sum(row["feature_seconds"] for row in features)
    tokens = sum(row["answer_tokens"] for row in features)
    first = features[0]
    return (
        f"Prompt and answer up to {first['max_length']} tokens: {first['rows']}. {sizes}. "
        f"Feature pass: {cpu:.0f} processor seconds ({wall:.0f} s on the shared machine) for "
        f"{tokens:,} answer tokens and their prompts, once.\n"
    )


def _final(rows: Sequence[Row]) -> str:
    runs, means = _step(rows, "final"), _step(rows, "mean")
    if not means:
        return ""
    mean, first = means[-1], runs[0]
    lines = [
        f"### Test split: {mean['pairs']} pairs of {mean['prompts']} prompts\n",
        f"Chosen from {mean['searched']} configurations: {_describe(mean['choice'])}.\n",
        "| preferred by | accuracy |", "| --- | --- |",
        f"| base, Σ log-probability | {_with_se(first, 'accuracy_base_sum')} |",
        f"| base, mean log-probability | {_with_se(first, 'accuracy_base_mean')} |",
        f"| length ({first['length_baseline']}) | {_with_se(first, 'accuracy_length')} |",
        f"| **Q-Adapter, implicit reward, mean of {len(runs)} seeds** | "
        f"**{mean['accuracy']:.3f}** ± {mean['accuracy_se']:.3f} "
        f"(between seeds: SD {mean['accuracy_seed_sd']:.3f}) |",
        f"| gain over the base's mean log-probability | {_with_se(mean, 'gain_over_base_mean')} |",
        "", _table(runs, {"seed": lambda row: str(row["seed"])}),
    ]
    return "\n".join(lines)


def _search(rows: Sequence[Row]) -> str:
    runs = _step(rows, "search")
    if not runs:
        return ""
    first = runs[0]
    return "\n".join([
        f"### Validation split: {first['pairs']} pairs of {first['prompts']} prompts, one seed\n",
        f"Base: Σ {_with_se(first, 'accuracy_base_sum')}, mean "
        f"{_with_se(first, 'accuracy_base_mean')}; length ({first['length_baseline']}) "
        f"{_with_se(first, 'accuracy_length')}.\n",
        _table(runs, {"configuration": lambda row: _describe(row["choice"])}),
    ])


def _table(runs: Sequence[Row], first: dict[str, Callable[[Row], str]]) -> str:
    columns: dict[str, Callable[[Row], str]] = first | {
        "accuracy": lambda row: _with_se(row, "accuracy"),
        "length-controlled": lambda row: _number(row["accuracy_length_controlled"]),
        "policy Σ / mean": lambda row: (
            f"{row['accuracy_policy_sum']:.3f} / {row['accuracy_policy_mean']:.3f}"
        ),
        "KL answers": lambda row: f"{row['kl_answers']:.4f}",
        "KL helpful": lambda row: f"{row['kl_helpful']:.4f}",
        "KL unrelated": lambda row: f"{row['kl_unrelated']:.4f}",
        "perplexity (base)": lambda row: (
            f"{row['perplexity']:.2f} ({row['perplexity_base']:.2f})"
        ),
        "training s": lambda row: _seconds(row, "training"),
        "evaluation s": lambda row: _seconds(row, "evaluation"),
    }
    return "\n".join([
        f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}",
        *(f"| {' | '.join(show(row) for show in columns.values())} |" for row in runs), "",
    ])


def _environment(rows: Sequence[Row]) -> str:
    last = rows[-1]["environment"]
    versions = ", ".join(
        f"{name} {last[name]}" for name in ("python", "torch", "transformers", "qadapter")
    )
    commits = dict.fromkeys(row["environment"]["commit"] for row in rows)
    runs = [row for row in rows if row["step"] in ("search", "final")]
    total = sum(r["training_cpu_seconds"] + r["evaluation_cpu_seconds"] for r in runs)
    total += sum(row["feature_cpu_seconds"] for row in _step(rows, "features"))
    seconds = f" {total:.0f} processor seconds in all." if runs else ""
    mean = fmean(row["environment"]["threads"] for row in rows)
    return (
        f"Base {rows[-1]['base']}. {last['machine']}, {last['cores']} cores, {mean:.0f} thread(s); "
        f"{versions}; {last['date']}; commit {', '.join(map(str, commits))}.{seconds}\n"
    )


def _describe(choice: Row) -> str:
    return (
        f"α₀ = α̃ = {choice['alpha']:g}, learning rate {choice['learning_rate']:g}, "
        f"{choice['epochs']} epoch{'s' * (choice['epochs'] > 1)}, retention "
        f"{choice['retention']:g}, {choice['form']}, χ² {choice['chi2']:g}"
    )


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def _with_se(row: Row, name: str) -> str:
    return f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}"


def _seconds(row: Row, phase: str) -> str:
    return f"{row[f'{phase}_cpu_seconds']:.0f} ({row[f'{phase}_seconds']:.0f})"
