"""Prints the oldest versions that pyproject.toml allows, as constraints for pip.

torch is left out: the Makefile pins it, as there are no CPU builds of its oldest version.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def lower_bounds(project: dict) -> dict[str, str]:
    """Versions by package. A package that is named twice must have one lower bound."""
    bounds = {}
    for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
        if requirement.startswith(f"{project['name']}[") or "==" in requirement.split(";")[0]:
            continue
        found = re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
        if found is None:
            raise SystemExit(f"{requirement!r} has no lower bound")
        if bounds.setdefault(*found.groups()) != found[2]:
            raise SystemExit(f"{found[1]}: is {bounds[found[1]]} or {found[2]} the oldest?")
    return bounds


if __name__ == "__main__":
    for package, version in lower_bounds(PROJECT).items():
        if package != "torch":
            print(f"{package}=={version}")
