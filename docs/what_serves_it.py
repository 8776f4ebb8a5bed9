"""Rewrites the tables of README.md and docs/serving.md, each between two comments.

    python docs/what_serves_it.py

The engines' commands: those of qadapter/exporting/engines.py.

What serves an export: runs tests/test_serving.py; a test marked ``serves(engine, form)`` is a row,
with its outcome. What decoding costs: the last records of benchmarks/generation.py on a CPU.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from pathlib import Path

import pytest

from qadapter.exporting import engines
from qadapter.exporting.forms import FORMS

ROOT = Path(__file__).parent.parent
SERVING = ROOT / "docs/serving.md"
PAGES = (ROOT / "README.md", SERVING)
GENERATION = ROOT / "benchmarks/results/generation.jsonl"
PACKAGES = ("transformers", "peft", "torch")


class Rows:
    """A pytest plugin: collects (engine, form, test, outcome)."""

    def __init__(self) -> None:
        self.marks: dict[str, tuple[str, str]] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if mark := item.get_closest_marker("serves"):
                self.marks[item.nodeid] = mark.args

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def table(self) -> str:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        lines = [
            f"{datetime.date.today():%Y-%m-%d}, {versions}, Python {platform.python_version()}, "
            "on a CPU:",
            "",
            "| engine | form | test | outcome |",
            "| --- | --- | --- | --- |",
        ]
        for test, (engine, form) in self.marks.items():
            name = test.rpartition("::")[2]
            lines.append(f"| {engine} | {form} | `{name}` | {self.outcomes.get(test, 'not run')} |")
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


def main() -> int:
    """Run the tests, write the tables; the tests' exit code."""
    rows = Rows()
    code = pytest.main(["-q", str(ROOT / "tests/test_serving.py")], plugins=[rows])
    for page in PAGES:
        put(page, "what serves it", rows.table())
    put(SERVING, "costs", costs())
    put(SERVING, "commands", commands())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
