"""Rewrites the table of what serves an export from the tests that just ran.

    python docs/what_serves_it.py

Runs tests/test_serving.py; a test marked ``serves(engine, form)`` is a row, with its outcome. The
table stands between two comments in README.md and in docs/serving.md.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/serving.md")
TABLE = re.compile(r"(<!-- what serves it -->\n).*?(<!-- end -->)", re.DOTALL)
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


def main() -> int:
    """Run the tests, write the tables; the tests' exit code."""
    rows = Rows()
    code = pytest.main(["-q", str(ROOT / "tests/test_serving.py")], plugins=[rows])
    for page in PAGES:
        text, found = TABLE.subn(
            lambda m: m[1] + rows.table() + m[2], page.read_text(encoding="utf-8")
        )
        if found != 1:
            print(f"{page}: the table's comments are missing", file=sys.stderr)
            return 1
        page.write_text(text, encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
