"""docs/method.md names a test for each fact, and each fact's test is named there."""

from __future__ import annotations

import ast
import re

from pages import ROOT, read


def test_every_fact_names_its_tests_and_every_test_is_named():
    tree = ast.parse((ROOT / "tests/test_facts.py").read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_fact_")}
    section = read("docs/method.md").partition("\n## Facts\n")[2].partition("\n## ")[0]
    facts = re.split(r"^(\d)\. ", section, flags=re.MULTILINE)[1:]
    named = {number: set(re.findall(r"`(test_fact_\w+)`", text))
             for number, text in zip(facts[::2], facts[1::2], strict=True)}
    assert list(named) == [str(n) for n in range(1, 9)]
    assert set().union(*named.values()) == tests
    for number, names in named.items():
        assert names and all(name.startswith(f"test_fact_{number}_") for name in names), number
