"""Rewrites the tables of docs/serving.md, each between two comments, from committed results.

    python docs/what_serves_it.py

The engines' commands: those of qadapter/exporting/engines.py. What serves an export: the last run
of ``make test-engines``. What decoding costs: the last records of benchmarks/generation.py on a
CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qadapter.exporting import engines
from qadapter.exporting.forms import FORMS

ROOT = Path(__file__).parent.parent
SERVING = ROOT / "docs/serving.md"
GENERATION = ROOT / "benchmarks/results/generation.jsonl"
ENGINES = ROOT / "benchmarks/results/engines.json"


def served() -> str:
    """A row for each engine and form: how much of its answers is ours."""
    found = json.loads(ENGINES.read_text(encoding="utf-8"))
    dates = sorted({engine["date"] for engine in found["engines"].values()})
    lines = [
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {found['base']} in "
        f"{found['dtype']}, {found['prompts']} chat prompts, up to {found['tokens']} tokens each, "
        f"greedy, {found['cores']} cores of {found['processor']}; ours: transformers "
        f"{found['versions']['transformers']}, torch {found['versions']['torch']}:",
        "",
        "| engine | form | same tokens | largest difference of a log-probability | gap where they "
        "part |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, engine in found["engines"].items():
        for row in engine["rows"]:
            difference, gap = row["difference"], max(row["gaps"], default=None)
            cells = (
                f"{name} {engine['version']}", row["form"],
                f"{row['same']} of {row['compared']}" + (" **wrong**" if row["wrong"] else ""),
                "not told" if difference is None else f"{difference:.1g}",
                "–" if gap is None else f"{gap:.1g}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def costs() -> str:
    """Milliseconds a step, and over the base's, for each way of decoding and batch size."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import report

    records = [r for r in report.latest(GENERATION, "cpu") if r["status"] == "ok"]
    batches = sorted({r["shape"]["B"] for r in records})
    cells = {(r["provider"], r["shape"]["B"]): r for r in records}
    first = records[0]
    where = first["environment"]
    header = [f"batch {b}, ms a step | × base" for b in batches]
    lines = [
        f"{first['shape']['model']}, bfloat16, {where['machine']}, threads: {where['threads']}, "
        f"torch {where['torch']}, {where['date'][:10]}, commit {where['commit']}; medians of "
        f"{min(r['rounds'] for r in records)} rounds or more, load average "
        f"{max(r['load_average'][0] for r in records):.0f}:",
        "",
        f"| decoding | {' | '.join(header)} |",
        "| --- |" + " ---: | ---: |" * len(batches),
    ]
    for provider in dict.fromkeys(r["provider"] for r in records):
        row = (cells[provider, b] for b in batches)
        values = [f"{r['ms_per_token']:.1f} | {r['times_base']:.2f}" for r in row]
        lines.append(f"| {provider} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Every engine's commands for every form, and what it doesn't take of it."""
    lines = []
    for engine in engines.ENGINES:
        version = engines.SEEN.get(engine)
        lines += [f"### {engine}" + (f" ({version})" if version else ""), ""]
        shell: list[str] = []
        said: dict[str, list[str]] = {}
        for form in FORMS:
            export = engines.Served(form, f"mine-{form.replace('_', '-')}")
            way = next(way for way in engines.ways(export) if way.engine == engine)
            if way.commands:
                shell += ["", f"# {form}", *way.commands]
            for words in filter(None, (*engines.limits(engine, form), way.note)):
                said.setdefault(words, []).append(f"`{form}`")
        lines += ["```sh", *shell[1:], "```", ""]
        lines += [f"- {', '.join(forms)}: {words}" for words, forms in said.items()]
        lines += [""] if said else []
    return "\n".join(lines)


def put(page: Path, name: str, table: str) -> None:
    """Put a table between the two comments that name it.

    Raises:
        SystemExit: the comments are missing.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    if text.count(begin) != 1:
        sys.exit(f"{page}: {begin.strip()} is missing")
    before, _, rest = text.partition(begin)
    page.write_text(before + begin + table + end + rest.partition(end)[2], encoding="utf-8")


def main() -> None:
    """Write all tables."""
    put(SERVING, "what serves it", served())
    put(SERVING, "costs", costs())
    put(SERVING, "commands", commands())


if __name__ == "__main__":
    main()
