"""Draws docs/house.svg, the rooms of the house and who leans on whom, from the imports.

    python docs/house.py

An arrow says that a room imports another; one that follows from two others is left out. Arrows run
down only, but for the ``DOORS``: ``house()`` refuses any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/house.svg"

ROOMS = {
    "commands": (0, 500, "the command line"),
    "compare": (1, 110, "methods side by side"),
    "planning": (1, 305, "what a run will take"),
    "demo": (1, 500, "what make demo runs"),
    "integrations": (1, 695, "lm-eval, vLLM, exemplars"),
    "serving": (1, 890, "the server and its page"),
    "exporting": (3, 110, "checkpoints others serve"),
    "training": (3, 305, "trainer, features, resuming"),
    "evaluation": (3, 585, "learned, lost; judges"),
    "console": (3, 890, "folders, progress, signals"),
    "policy": (4, 585, "what comes out: the model"),
    "adapters": (5, 500, "what is trained"),
    "objective": (5, 785, "rewards and losses"),
    "data": (6, 145, "formats, pairs, tokens"),
    "trunk": (6, 500, "what is frozen"),
    "system": (7, 325, "files, locks, limits, errors"),
    "qadapter_kernels": (7, 785, "fused operators"),
}
"""Every room: its floor, counted from the roof, where on it, and what is in it."""
WITH = {
    "cli": "commands", "errors": "system", "composition": "policy", "decoding": "policy",
    "sampling": "policy",
}
"""Loose modules, and the room that each belongs to."""
DOORS = {("policy", "exporting"): "QAdapterModel.export: opened when it is used"}
"""Arrows that go up, each inside a function."""


def room_of(module: str) -> str | None:
    """The room of a dotted name; None of what is not ours, and of the lazy ``qadapter`` itself."""
    package, _, rest = module.partition(".")
    if package == "qadapter_kernels":
        return package
    name = rest.partition(".")[0]
    name = WITH.get(name, name)
    return name if package == "qadapter" and name in ROOMS else None


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it runs when the module is loaded) of a file's imports; those for a
    type checker alone are none."""
    tree = ast.parse(file.read_text())
    unseen = {
        id(inner) for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    later = {
        id(inner) for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in later


def house() -> dict[str, set[str]]:
    """The rooms, each with those it imports.

    Raises:
        SystemExit: a module in no room, or an arrow that doesn't run down; it says which files.
    """
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    wrong = []
    for file in sorted((ROOT / "qadapter").rglob("*.py")):
        place = file.relative_to(ROOT)
        if str(place) == "qadapter/__init__.py":
            continue
        room = room_of(".".join(place.with_suffix("").parts))
        if room is None:
            raise SystemExit(f"{place} is in no room: docs/house.py names them")
        for name, at_once in imports(file):
            other = room_of(name)
            if other is None or other == room or (not at_once and (room, other) in DOORS):
                continue
            if ROOMS[other][0] <= ROOMS[room][0]:
                wrong.append(f"{place} imports {name}")
            found[room].add(other)
    if wrong:
        raise SystemExit("arrows run down only (docs/house.py): " + "; ".join(wrong))
    return found


def reached(rooms: dict[str, set[str]], start: str) -> set[str]:
    """All rooms below one."""
    return set().union(*({room} | reached(rooms, room) for room in rooms[start]))


def needed(rooms: dict[str, set[str]]) -> dict[str, list[str]]:
    """The arrows that follow from no others."""
    return {
        room: [b for b in ROOMS if b in below
               and not any(b in reached(rooms, c) for c in below - {b})]
        for room, below in rooms.items()
    }


WIDTH, HEIGHT, BOX, FLOOR = 1000, 640, (180, 46), 80
STYLE = """
  svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --wall: #eaf2fb; --edge: #4a7ab0;
        background: var(--paper) }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #14181d; --ink: #e6edf3; --soft: #a3adb8; --wall: #1d2a3a; --edge: #7aa7d8 }
  }
  rect { fill: var(--wall); stroke: var(--edge) }
  text { fill: var(--ink); font: 600 14px system-ui, sans-serif; text-anchor: middle }
  text.what { fill: var(--soft); font-weight: 400; font-size: 12px }
  path { stroke: var(--edge); fill: none; stroke-width: 1.4; marker-end: url(#tip) }
  marker path { fill: var(--edge); stroke: none; marker-end: none }
"""


def picture(rooms: dict[str, set[str]]) -> str:
    """The SVG: every room on its floor, arrows from one's lower edge to another's upper edge."""
    width, height = BOX
    top = {room: 17 + FLOOR * floor for room, (floor, _, _) in ROOMS.items()}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="title">',
        '<title id="title">The rooms of qadapter; arrows: what imports what</title>',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    arrows = [(a, b) for a, below in needed(rooms).items() for b in below]
    leaving = {a: sorted((b for x, b in arrows if x == a), key=lambda b: ROOMS[b][1])
               for a in ROOMS}
    coming = {b: sorted((a for a, x in arrows if x == b), key=lambda a: ROOMS[a][1])
              for b in ROOMS}
    for a, b in arrows:
        x, y = _along(a, leaving[a].index(b), len(leaving[a])), top[a] + height
        to_x, to_y = _along(b, coming[b].index(a), len(coming[b])), top[b] - 1
        lines.append(f'<path d="M{x} {y}L{to_x} {to_y}"/>')
    for room, (_, x, what) in ROOMS.items():
        y = top[room]
        lines += [
            f'<rect x="{x - width // 2}" y="{y}" width="{width}" height="{height}" rx="6"/>',
            f'<text x="{x}" y="{y + 20}">{room}</text>',
            f'<text class="what" x="{x}" y="{y + 37}">{escape(what)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _along(room: str, place: int, count: int) -> int:
    """Where on a box's edge the one arrow of so many stands."""
    return round(ROOMS[room][1] + BOX[0] * 0.7 * ((place + 1) / (count + 1) - 0.5))


if __name__ == "__main__":
    PICTURE.write_text(picture(house()))
    print(f"wrote {PICTURE.relative_to(ROOT)}")
