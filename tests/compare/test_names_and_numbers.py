"""Reports of comparisons whose names hold anything, and whose numbers are none: from results that
were written by hand, so that nothing is trained."""

from __future__ import annotations

import json

import pytest
from comparisons import settings, write_config
from hostile.reading import Seen
from hostile.texts import TEXTS
from made_up import write_results
from PIL import Image
from tiny_models import cli

from qadapter import QAdapterError
from qadapter.compare import read_config
from qadapter.compare.config import folder_name
from qadapter.system.markup import one_line, visible

pytestmark = pytest.mark.slow

USABLE = [text for text in TEXTS if one_line(text) == text and len(text) < 100]


def named(names: list[str]) -> dict:
    """A configuration in which all that is named has these names: no two alike as folders."""
    names = list({folder_name(name): name for name in names if name.strip(".")}.values())
    return {
        "title": "".join(TEXTS[:9]), "sweeps": {
            name: {"of": names[0], "option": "beta", "values": [0.3, 1.0]} for name in names[:2]
        },
        "methods": {name: {"method": "dpo", "beta": 0.3} for name in names},
        "evaluation": {**settings()["evaluation"], "retention": [
            {"name": name, "file": "texts.txt"} for name in names[:3]
        ]}, "reference": names[1],
    }


@pytest.mark.parametrize("first", (0, 40))
def test_a_report_shows_every_name(tmp_path, capsys, first):
    written = named(USABLE[first : first + 40])
    path = write_config(tmp_path, **written)
    write_results(read_config(path), tmp_path / "out")
    assert cli("compare", path, "--output_dir", tmp_path / "out", "--report_only") == 0
    shown = capsys.readouterr().out
    page = Seen((tmp_path / "out/report-validation.html").read_text())
    running = {"script", "img", "iframe", "link", "base", "a", "form", "input"}
    assert running.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert visible(written["title"]) in page.text
    for name in written["methods"]:
        # In the tables, and in the pictures' labels.
        assert page.text.count(name) >= 5 and name in shown
    pictures = sorted(p.name for p in (tmp_path / "out/pictures-validation").iterdir())
    assert len(pictures) == 5 + len(written["sweeps"])
    for name in pictures:
        with Image.open(tmp_path / "out/pictures-validation" / name) as picture:
            assert picture.width > 600


@pytest.mark.parametrize("numbers", [
    {"kl": 0.0}, {"kl": None, "number": None}, {"kl": 1e308, "number": 1e300},
    {"kl": 1e-320, "number": -1e-320}, {"kl": 0.0, "number": None},
])
def test_a_report_of_numbers_that_are_none(tmp_path, numbers):
    """Runs that have moved nothing, and runs of which nothing could be measured."""
    methods = {name: settings()["methods"][name] for name in ("dpo", "q", "asked", "back")}
    path = write_config(tmp_path, methods=methods)
    write_results(read_config(path), tmp_path / "out", **numbers)
    assert cli("compare", path, "--output_dir", tmp_path / "out", "--report_only") == 0
    page = Seen((tmp_path / "out/report-validation.html").read_text())
    tables, _ = page.text.split("Configuration")
    assert tables.count("dpo") > 3 and "nan" not in tables.split()
    json.loads((tmp_path / "out/summary-validation.json").read_text(), parse_constant=pytest.fail)


def test_a_report_says_what_moves_at_equal_gain(tmp_path):
    """Rows with a dial, beside the reference; every setting here gains as much as it does."""
    methods = {name: settings()["methods"][name] for name in ("dpo", "q", "asked")}
    path = write_config(tmp_path, methods=methods)
    write_results(read_config(path), tmp_path / "out")
    assert cli("compare", path, "--output_dir", tmp_path / "out", "--report_only") == 0
    page = (tmp_path / "out/report-validation.html").read_text()
    table = page.split("<h2>At the gain of dpo</h2>")[1].split("</table>")[0]
    assert "<td>q</td><td>≤ 1.00</td><td>≤ 1.00 [1.00, 1.00]</td>" in table
    assert "asked" not in table
    found = json.loads((tmp_path / "out/summary-validation.json").read_text())["at_equal_gain"]
    assert found["q"]["at_most"] and found["q"]["kl_ratio:texts_ci"] == [1.0, 1.0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"methods": {"a\nb": {"method": "sft"}}}, r"methods: 'a\\nb' can't be a name"),
    ({"methods": {"a\x1b[2J": {"method": "sft"}}}, r"methods: 'a\\x1b\[2J' can't be a name"),
    ({"methods": {" a": {"method": "sft"}}}, "methods: ' a' can't be a name"),
    ({"methods": {"é" * 101: {"method": "sft"}}}, r"no file can have one of 202 bytes"),
    ({"methods": {"d" * 195: {"method": "dpo"}},
      "sweeps": {"s": {"of": "d" * 195, "option": "beta", "values": [0.25]}}}, "205 bytes"),
    ({"sweeps": {"": {"of": "dpo", "option": "beta", "values": [1.0]}}}, "sweeps: a name is empty"),
    ({"sweeps": {"s" * 201: {"of": "dpo", "option": "beta", "values": [1.0]}}}, "201 bytes"),
    ({"sweeps": {x: {"of": "dpo", "option": "beta", "values": [1.0]} for x in ("a/b", "a b")}},
     "sweeps.a b: its picture would be that of 'a/b'"),
    ({"evaluation": {"retention": [{"name": "\u202e", "file": "texts.txt"}]}},
     r"evaluation.retention: '\\u202e' can't be a name"),
])
def test_names_that_nothing_can_have_are_refused_before_anything_runs(tmp_path, changes, message):
    if "methods" in changes:
        changes = {"sweeps": {}, "reference": None} | changes
    with pytest.raises(QAdapterError, match=message):
        read_config(write_config(tmp_path, **changes))
