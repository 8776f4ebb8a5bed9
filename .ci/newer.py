"""Prints the packages that pip would bring up to date in this environment, one to a line.

That is what the newest versions differ in from those that the tests have run with.

    python .ci/newer.py 'torch==2.13.0' -e '.[dev]'
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version


def _there(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def newer(requirements: list[str]) -> dict[str, str]:
    """Of each package that would be installed for these arguments of pip: "old → new"."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-",
               "--upgrade", "--upgrade-strategy", "eager", *requirements]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found = (entry["metadata"] for entry in report["install"] if not entry["is_direct"])
    return {each["name"]: f"{_there(each['name'])} → {each['version']}" for each in found}


if __name__ == "__main__":
    for name, change in newer(sys.argv[1:]).items():
        print(f"{name}: {change}")
