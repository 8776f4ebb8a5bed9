"""The picture of the house is drawn from the imports as they are, and its arrows run down."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from pages import ROOT
from scripts import load_script

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def drawn():
    """docs/house.py."""
    return load_script(ROOT / "docs/house.py")


def test_the_picture_is_up_to_date(drawn):
    rooms = drawn.house()
    assert drawn.PICTURE.read_text() == drawn.picture(rooms), "python docs/house.py draws it anew"
    assert rooms["qadapter_kernels"] == set()  # imports torch, and triton where there is one


def test_the_picture_shows_every_room_and_every_arrow_once(drawn):
    rooms = drawn.house()
    root = ET.parse(drawn.PICTURE).getroot()
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert set(rooms) <= set(texts) and len(root.findall(f"{SVG}rect")) == len(rooms)
    arrows = drawn.needed(rooms)
    assert len(root.findall(f"{SVG}path")) == sum(map(len, arrows.values()))
    for room in rooms:  # what is left out follows from what is shown
        assert drawn.reached(arrows, room) == drawn.reached(rooms, room)


def test_boxes_stand_apart_and_inside(drawn):
    root = ET.parse(drawn.PICTURE).getroot()
    boxes = [tuple(int(box.get(k)) for k in ("x", "y", "width", "height"))
             for box in root.findall(f"{SVG}rect")]
    for i, (x, y, width, height) in enumerate(boxes):
        assert 0 <= x and x + width <= drawn.WIDTH and 0 <= y and y + height <= drawn.HEIGHT
        for other_x, other_y, *_ in boxes[:i]:
            assert abs(x - other_x) > width or abs(y - other_y) > height


@pytest.mark.parametrize(
    "line", ["from qadapter.training import config", "import qadapter.serving.app",
             "def late():\n    from qadapter.policy.model import QAdapterModel"],
)
def test_an_arrow_that_goes_up_is_refused_by_the_file_it_is_in(drawn, monkeypatch, tmp_path, line):
    file = tmp_path / "qadapter/adapters/fresh.py"
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    monkeypatch.setattr(drawn, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=re.escape("qadapter/adapters/fresh.py imports qadapter.")):
        drawn.house()


def test_a_door_is_open_inside_a_function_alone(drawn, monkeypatch, tmp_path):
    file = tmp_path / "qadapter/policy/fresh.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(drawn, "ROOT", tmp_path)
    upstairs = "from qadapter.exporting.export import export"
    file.write_text(f"def door():\n    {upstairs}\n")
    assert drawn.house()["policy"] == set()
    file.write_text(f"from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    {upstairs}\n")
    assert drawn.house()["policy"] == set()
    file.write_text(f"{upstairs}\n")
    with pytest.raises(SystemExit, match="arrows run down only"):
        drawn.house()


def test_a_module_in_no_room_is_named(drawn, monkeypatch, tmp_path):
    file = tmp_path / "qadapter/cellar/wine.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(drawn, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"qadapter/cellar/wine\.py is in no room"):
        drawn.house()
