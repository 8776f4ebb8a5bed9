"""Rewrites the tables of docs/api.md, each between two comments, by what is public.

    python docs/what_it_offers.py

The site says more of each name: its signature and its whole docstring (docs/conf.py).
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from what_serves_it import ROOT, put

API = ROOT / "docs/api.md"
MODULES = (
    "qadapter", "qadapter.data", "qadapter.composition", "qadapter.sampling", "qadapter.decoding",
    "qadapter.evaluation", "qadapter.evaluation.judges", "qadapter.compare", "qadapter.planning",
    "qadapter.demo", "qadapter_kernels",
)
"""All that have public names of their own: of qadapter.adapters and qadapter.training the rest is
in qadapter too."""
ELSEWHERE = {"HeadAdapter": "qadapter.adapters", "FeatureSet": "qadapter.training"}
"""What those two have beside, shown with qadapter's."""


def names(module: str) -> list[tuple[str, str]]:
    """(module, name) of all that is shown under a module's heading."""
    own = [(module, name) for name in importlib.import_module(module).__all__]
    return own + [(home, name) for name, home in ELSEWHERE.items() if module == "qadapter"]


def in_a_line(module: str, name: str) -> str:
    """The first sentence of what a name's docstring says; of a dict, what its entries are; of a
    union, its types."""
    value = getattr(importlib.import_module(module), name)
    if isinstance(value, dict):
        return f"{len(value)} texts by name: {', '.join(f'`{key}`' for key in value)}"
    if isinstance(value, types.UnionType):
        parts = typing.get_args(value)
        return "One of " + ", ".join(f"`{getattr(part, '__name__', part)}`" for part in parts)
    paragraph = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    sentence = re.match(r".*?[.:](?= [A-ZΑ-Ω`]|$)|.*", paragraph)[0].rstrip(".:")
    return re.sub(r"``(.+?)``", r"`\1`", sentence).replace("|", r"\|")


def table(module: str) -> str:
    """A row a name."""
    rows = [
        f"| `{name}` | {in_a_line(home, name)} |" if home == module else
        f"| `{home}.{name}` | {in_a_line(home, name)} |"
        for home, name in names(module)
    ]
    return "\n".join(["| name | |", "| --- | --- |", *rows]) + "\n"


def main() -> None:
    """Write all tables."""
    for module in MODULES:
        put(API, f"names: {module}", table(module))


if __name__ == "__main__":
    main()
